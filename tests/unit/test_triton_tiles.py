"""The table of tiles: which row is chosen, and how a tuner rewrites it."""

from pathlib import Path

import pytest

from models.errors import KernelError
from models.kernels.triton import tiles as table
from models.kernels.triton.tiles import ANY_ROWS, SHARED_MEMORY, TILES, Tile, choose_tile, num_parts, tiles_of
from tools import tune_tiles
from tools.tune_tiles import Shape, best_tile, candidates, merged, rewritten

SMALL = Tile("linear16", 80, 4, 16, 16, 64, 128, 16, 4, 4)
LARGE = Tile("linear16", 80, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_every_architecture_has_a_tile_for_every_number_of_rows(arch: int, num_bits: int) -> None:
    tiles = tiles_of("linear16", arch, num_bits)
    assert [tile.max_rows for tile in tiles] == sorted({tile.max_rows for tile in tiles})
    assert tiles[-1].max_rows == ANY_ROWS
    for num_rows in (1, 2, 16, 17, 100, 5000):
        tile = choose_tile(tiles, num_rows)
        assert tile.arch == arch
        # one row alone is not multiplied on tensor cores, more rows are: their tiles have at least 16
        assert (tile.block_m == 1) if num_rows == 1 else tile.block_m >= 16
    for tile in tiles:
        for size in (tile.block_m, tile.block_n, tile.block_k, tile.max_split, tile.num_warps):
            assert size & (size - 1) == 0


def test_a_newer_card_takes_the_rows_of_the_nearest_older_one() -> None:
    assert tiles_of("linear16", 87, 4) == tiles_of("linear16", 86, 4)
    assert tiles_of("linear16", 120, 4) == tiles_of("linear16", 100, 4)
    with pytest.raises(KernelError, match="no tiles of linear16 for 4-bit codes on architecture 75"):
        tiles_of("linear16", 75, 4)


@pytest.mark.parametrize("num_tiles", [1, 7, 64, 300])
@pytest.mark.parametrize("num_blocks", [1, 3, 64])
@pytest.mark.parametrize("num_processors", [58, 132])
def test_channels_are_divided_until_the_card_is_full_and_no_part_is_empty(
    num_tiles: int, num_blocks: int, num_processors: int
) -> None:
    parts = num_parts(SMALL, num_tiles, num_blocks, num_processors)
    assert 1 <= parts <= min(SMALL.max_split, num_blocks)
    if parts > 1:
        assert parts // 2 * num_tiles < 2 * num_processors
    assert num_parts(LARGE, num_tiles, num_blocks, num_processors) == 1


def wanted(tile: Tile) -> bool:
    return (tile.block_n, tile.num_warps, tile.num_stages) == (64, 4, 3)


def fake_timer(tile: Tile, shape: Shape, num_rows: int) -> float | None:
    """The wanted tiles are twice as fast, those of 128 channels do not run."""
    if tile.block_k == 128:
        return None
    return shape[0] * shape[1] * num_rows * (0.5 if wanted(tile) else 1.0)


def test_the_fastest_tile_over_all_layers_is_chosen_and_large_layers_count_no_more_than_small_ones() -> None:
    tiles = candidates(80, 4, 16)
    best = best_tile(tiles, ((64, 64), (4096, 4096)), (2, 16), fake_timer)
    assert best is not None
    assert wanted(best)
    slow_on_small = {tiles[0]: (9.0, 10.0), tiles[1]: (1.0, 11.0)}

    def timer(tile: Tile, shape: Shape, _: int) -> float | None:
        return slow_on_small[tile][shape != (1, 1)]

    assert best_tile(tiles[:2], ((1, 1), (2, 2)), (1,), timer) == tiles[1]
    assert best_tile(tiles, ((64, 64),), (2,), lambda *_: None) is None


def test_a_table_is_rewritten_between_its_marks_and_twice_gives_the_same_text() -> None:
    text = Path(table.__file__).read_text(encoding="utf-8")
    assert rewritten(text, TILES) == text
    changed = SMALL._replace(block_n=32)
    once = rewritten(text, merged(TILES, [changed]))
    assert once == rewritten(once, merged(TILES, [changed])[::-1])
    namespace: dict[str, object] = {"Tile": Tile, "ANY_ROWS": ANY_ROWS}
    source = once[once.index(tune_tiles.BEGIN) : once.index(tune_tiles.END)].replace("TILES: tuple[Tile, ...]", "TILES")
    exec(source, namespace)
    assert namespace["TILES"] == tuple(sorted(changed if tile[:4] == changed[:4] else tile for tile in TILES))
    with pytest.raises(ValueError, match="no table between"):
        rewritten("TILES = ()", TILES)


def test_the_tuner_changes_the_rows_of_its_own_card_only(tmp_path: Path) -> None:
    file = tmp_path / "tiles.py"
    file.write_text(Path(table.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    tune_tiles.main(["--table", str(file), "--bits", "4"], device=(89, fake_timer))
    text = file.read_text(encoding="utf-8")
    old = {line for line in Path(table.__file__).read_text(encoding="utf-8").splitlines() if "Tile(" in line}
    new = {line for line in text.splitlines() if "Tile(" in line}
    assert len(new) == len(old)
    assert all('"linear16", 89, 4,' in line for line in new - old)
    assert new - old


def test_without_a_gpu_the_tuner_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="tiles are timed on a GPU"):
        tune_tiles.main(["--table", str(tmp_path / "none.py")])
