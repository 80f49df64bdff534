"""Sizes of tiles by kernel, architecture, bits of a code and rows of input: one list, rewritten by a tuner.

Until a tuner has run on a card, its rows are guesses: they compile without spills and fit the card's shared memory
(``docs/gpu-kernels.md``), and nothing has been timed.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ...errors import KernelError

ANY_ROWS = 1 << 30
"""``max_rows`` of the tiles for every larger number of rows."""

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that one block may have, by architecture.

Source: CUDA C++ Programming Guide, technical specifications per compute capability.
"""


class Tile(NamedTuple):
    """How a kernel divides its work, for up to ``max_rows`` rows of input.

    kernel:     name of the kernels' module
    arch:       compute capability, 80 for 8.0; newer cards without rows of their own take the nearest older one's
    num_bits:   that a code takes in memory: 2, 3, 4 or 8
    block_m, block_n, block_k: rows, output channels and input channels of a tile, powers of two
    max_split:  most parts into which the input channels are divided, a power of two; 1: they are not
    num_warps, num_stages: of one program; loads in flight
    """

    kernel: str
    arch: int
    num_bits: int
    max_rows: int
    block_m: int
    block_n: int
    block_k: int
    max_split: int
    num_warps: int
    num_stages: int


# fmt: off
# tiles: begin
TILES: tuple[Tile, ...] = (
    Tile("linear16", 80, 2, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 80, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 80, 2, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 80, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 80, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear16", 80, 3, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 80, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 80, 3, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 80, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 80, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear16", 80, 4, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 80, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 80, 4, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 80, 4, 256, 64, 64, 64, 2, 4, 4),
    Tile("linear16", 80, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear16", 80, 8, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 80, 8, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 80, 8, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 80, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 80, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear16", 86, 2, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 2, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 2, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 86, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 86, 2, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 86, 3, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 3, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 3, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 86, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 86, 3, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 86, 4, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 4, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 4, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 86, 4, 256, 64, 64, 64, 2, 4, 3),
    Tile("linear16", 86, 4, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 86, 8, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 8, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 86, 8, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 86, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 86, 8, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 89, 2, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 2, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 2, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 89, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 89, 2, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 89, 3, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 3, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 3, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 89, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 89, 3, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 89, 4, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 4, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 4, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 89, 4, 256, 64, 64, 64, 2, 4, 3),
    Tile("linear16", 89, 4, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 89, 8, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 8, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear16", 89, 8, 64, 64, 64, 64, 8, 4, 3),
    Tile("linear16", 89, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 89, 8, ANY_ROWS, 128, 128, 32, 1, 8, 3),
    Tile("linear16", 90, 2, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 90, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 90, 2, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 90, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 90, 2, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 90, 3, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 90, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 90, 3, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 90, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 90, 3, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 90, 4, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 90, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 90, 4, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 90, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 90, 4, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 90, 8, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 90, 8, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 90, 8, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 90, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 90, 8, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 100, 2, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 100, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 100, 2, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 100, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 100, 2, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 100, 3, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 100, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 100, 3, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 100, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 100, 3, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 100, 4, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 100, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear16", 100, 4, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 100, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 100, 4, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear16", 100, 8, 1, 1, 64, 128, 16, 4, 3),
    Tile("linear16", 100, 8, 16, 16, 64, 64, 16, 4, 4),
    Tile("linear16", 100, 8, 64, 64, 64, 64, 8, 4, 4),
    Tile("linear16", 100, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear16", 100, 8, ANY_ROWS, 128, 128, 64, 1, 8, 4),
    Tile("linear8", 80, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 80, 2, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 80, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 80, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 80, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 80, 3, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 80, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 80, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 80, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 80, 4, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 80, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 80, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 80, 8, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 80, 8, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 80, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 80, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 86, 2, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 86, 2, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 86, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 86, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 86, 3, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 86, 3, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 86, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 86, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 86, 4, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 86, 4, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 86, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 86, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 86, 8, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 86, 8, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 86, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 86, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 89, 2, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 89, 2, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 89, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 89, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 89, 3, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 89, 3, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 89, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 89, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 89, 4, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 89, 4, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 89, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 89, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 89, 8, 16, 16, 64, 128, 16, 4, 3),
    Tile("linear8", 89, 8, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 89, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 89, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 90, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 90, 2, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 90, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 90, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 90, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 90, 3, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 90, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 90, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 90, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 90, 4, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 90, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 90, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 90, 8, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 90, 8, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 90, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 90, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 100, 2, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 100, 2, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 100, 2, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 100, 2, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 100, 3, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 100, 3, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 100, 3, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 100, 3, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 100, 4, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 100, 4, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 100, 4, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 100, 4, ANY_ROWS, 128, 128, 64, 1, 8, 3),
    Tile("linear8", 100, 8, 16, 16, 64, 128, 16, 4, 4),
    Tile("linear8", 100, 8, 64, 64, 64, 128, 8, 4, 3),
    Tile("linear8", 100, 8, 256, 64, 128, 64, 2, 4, 3),
    Tile("linear8", 100, 8, ANY_ROWS, 128, 128, 64, 1, 8, 3),
)
# tiles: end
# fmt: on


def tiles_of(kernel: str, arch: int, num_bits: int, tiles: Iterable[Tile] = TILES) -> tuple[Tile, ...]:
    """Rows of the table for codes of ``num_bits`` on ``arch``, by rising ``max_rows``, the last one for any number.

    Args:
        kernel: name of the kernels' module.
        arch: compute capability as one number; the nearest older one in the table is taken.
        num_bits: of a code, 2..8; 5 to 7 are stored as 8.
        tiles: the table.

    Raises:
        KernelError: the table has nothing for this kernel on this architecture or an older one.
    """
    stored = num_bits if num_bits <= 4 else 8
    fitting = [tile for tile in tiles if (tile.kernel, tile.num_bits) == (kernel, stored) and tile.arch <= arch]
    if not fitting:
        raise KernelError(f"no tiles of {kernel} for {stored}-bit codes on architecture {arch} or older: see tiles.py")
    nearest = max(tile.arch for tile in fitting)
    return tuple(sorted((tile for tile in fitting if tile.arch == nearest), key=lambda tile: tile.max_rows))


def choose_tile(tiles: Iterable[Tile], num_rows: int) -> Tile:
    """The first of ``tiles`` (by rising ``max_rows``) that takes ``num_rows``."""
    return next(tile for tile in tiles if num_rows <= tile.max_rows)


def num_parts(tile: Tile, num_tiles: int, num_blocks: int, num_processors: int) -> int:
    """Into how many parts to divide the input channels so that two programs come to each processor; a power of two.

    Args:
        tile: gives the most.
        num_tiles: tiles of the output.
        num_blocks: tiles of input channels; no part is empty.
        num_processors: multiprocessors of the card.
    """
    parts = 1
    while parts < tile.max_split and parts * num_tiles < 2 * num_processors and 2 * parts <= num_blocks:
        parts *= 2
    return parts
