"""Time the weight-only Triton kernels on the GPU that is here, and rewrite its rows of the table of tiles.

Usage: python -m tools.tune_tiles [--bits 2 3 4 8]

For each width of codes and each range of rows, candidate tiles are timed on layers of LLaMA's shapes with INT codes in
groups of 64 and a correction of rank 32; the tile with the least sum over the layers, each relative to its best, is
kept. Rows of other architectures stay as they are. Candidates that do not compile or do not fit are passed over.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.kernels.triton.environment import TritonEnvironment, architecture
from models.kernels.triton.tiles import ANY_ROWS, TILES, Tile
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.types import Correction, LinearWeights

if TYPE_CHECKING:
    from models.kernels.triton.layer16 import TritonLinear16

TABLE = Path("models/kernels/triton/tiles.py")
BEGIN, END = "# tiles: begin\n", "# tiles: end\n"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 4096))
"""(out_features, in_features)."""
ROWS: dict[int, tuple[int, ...]] = {1: (1,), 16: (2, 8, 16), 64: (32, 64), 256: (128, 256), ANY_ROWS: (512, 4096)}
"""``max_rows`` of a tile -> numbers of rows that it is timed with."""
RANK = 32

Shape = tuple[int, int]
Timer = Callable[[Tile, Shape, int], float | None]
"""(tile, shape, number of rows) -> seconds; None: the tile does not run."""
Device = tuple[int, Timer]
"""Architecture, and a timer on it."""


def candidates(arch: int, num_bits: int, max_rows: int) -> list[Tile]:
    """Tiles worth timing for up to ``max_rows`` rows."""
    heights = {1: (1,), 16: (16,), 64: (16, 32, 64), 256: (64, 128), ANY_ROWS: (64, 128)}[max_rows]
    split = {1: 16, 16: 16, 64: 8, 256: 2, ANY_ROWS: 1}[max_rows]
    widths = (32, 64, 128) if max_rows <= 16 else (64, 128, 256)
    sizes = itertools.product(heights, widths, (32, 64, 128), (4, 8), (2, 3, 4, 5))
    return [
        Tile("linear16", arch, num_bits, max_rows, height, width, depth, split, num_warps, num_stages)
        for height, width, depth, num_warps, num_stages in sizes
    ]


def best_tile(tiles: Iterable[Tile], shapes: Sequence[Shape], row_counts: Sequence[int], timer: Timer) -> Tile | None:
    """The tile with the least sum of times, each relative to the best tile's; of equals the first. None: none runs."""
    cases = list(itertools.product(shapes, row_counts))
    times: dict[Tile, list[float]] = {}
    for tile in tiles:
        measured = [timer(tile, shape, num_rows) for shape, num_rows in cases]
        found = [time for time in measured if time is not None]
        if len(found) == len(cases):
            times[tile] = found
    if not times:
        return None
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda tile: sum(a / b for a, b in zip(times[tile], fastest, strict=True)))


def rewritten(text: str, tiles: Iterable[Tile]) -> str:
    """The source ``text`` of the table with ``tiles`` in it, sorted: the same tiles always give the same text.

    Raises:
        ValueError: ``text`` has no table between its two marks.
    """
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"no table between {BEGIN.strip()!r} and {END.strip()!r}")
    rows = "".join(f"    {_row(tile)},\n" for tile in sorted(tiles))
    return f"{text[: start + len(BEGIN)]}TILES: tuple[Tile, ...] = (\n{rows})\n{text[end:]}"


def _row(tile: Tile) -> str:
    numbers = ("ANY_ROWS" if value == ANY_ROWS else str(value) for value in tile[1:])
    return f'Tile("{tile.kernel}", {", ".join(numbers)})'


def merged(old: Iterable[Tile], new: Iterable[Tile]) -> list[Tile]:
    """``old`` with the rows that ``new`` has for the same kernel, architecture, bits and rows put in their place."""
    return list({tile[:4]: tile for tile in (*old, *new)}.values())


def main(arguments: Sequence[str] | None = None, device: Device | None = None) -> None:
    """Tune and rewrite the table; ``device`` stands in for the GPU in tests.

    Raises:
        SystemExit: there is no GPU on which the kernels run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    arch, timer = device or gpu()
    found: list[Tile] = []
    for num_bits, (max_rows, row_counts) in itertools.product(options.bits, ROWS.items()):
        tile = best_tile(candidates(arch, num_bits, max_rows), SHAPES, row_counts, timer)
        print(f"{num_bits} bits, up to {max_rows} rows: {tile or 'no candidate runs, the old tile stays'}", flush=True)
        found += [] if tile is None else [tile]
    text = options.table.read_text(encoding="utf-8")
    options.table.write_text(rewritten(text, merged(TILES, found)), encoding="utf-8")


def gpu() -> Device:
    """Architecture of the current CUDA device, and a timer on it.

    Raises:
        SystemExit: there is no GPU on which the kernels run.
    """
    device = torch.device("cuda")
    reason = TritonEnvironment.read().why_not(device)
    if reason is not None:
        raise SystemExit(f"tiles are timed on a GPU: triton {reason}")
    return architecture(device), _time_on_gpu


def _time_on_gpu(tile: Tile, shape: Shape, num_rows: int) -> float | None:
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench_cudagraph

    layers = [replace(layer, tiles=(tile._replace(max_rows=ANY_ROWS),)) for layer in _layers(shape, tile.num_bits)]
    x = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
    try:
        milliseconds = do_bench_cudagraph(lambda: [layer(x) for layer in layers], return_mode="median")
    except (OutOfResources, PTXASError):
        return None
    return float(milliseconds) / len(layers) / 1000


@lru_cache(maxsize=2)
def _layers(shape: Shape, num_bits: int) -> "tuple[TritonLinear16, ...]":
    """The same layer as often as it takes to be larger than the cache twice: a network's weights are never in it."""
    from models.kernels.triton.layer16 import TritonLinear16

    out_features, in_features = shape
    quantized = quantize_rtn(torch.randn(shape, device="cuda"), QuantScheme(num_bits, 64))
    factors = torch.randn(out_features, RANK).bfloat16(), torch.randn(RANK, in_features).bfloat16()
    weights = LinearWeights(quantized, Correction(*factors))
    first = TritonLinear16.of(weights, torch.device("cuda"), torch.bfloat16)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = -(-2 * cache // first.nbytes)
    return first, *(TritonLinear16.of(weights, torch.device("cuda"), torch.bfloat16) for _ in range(copies))


if __name__ == "__main__":
    main()
