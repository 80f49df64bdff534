"""The Hadamard rotation of a tile that is already in registers; ``transform.hadamard`` says what it is for.

A block of 2**k channels is Sylvester's matrix, the Kronecker product of an outer and an inner one. The inner one, up
to 64 wide, is a product on the tensor cores with a matrix of +-1 that the kernel makes from its row and column numbers:
no memory holds it. Signs are exact in 16 bits and sums are float32, so 16-bit inputs lose nothing. What lies outside is
butterflies in float32, ``(a, b) -> (a + b, a - b)`` over pairs of rows of the reshaped tile.
"""

import triton
import triton.language as tl

from .parts import dot16

MIN_BLOCK = 16
"""Narrowest block: the shortest sum of a 16-bit product on the tensor cores."""
MAX_INNER = 64


def can_rotate(block: int) -> bool:
    """Whether ``rotate_tile`` applies blocks of this width: powers of two from 16 up, as wide as the tile or narrower.

    Other widths (Paley's matrices) are left to torch.
    """
    return block >= MIN_BLOCK and block & (block - 1) == 0


@triton.jit
def rotate_tile(tile, BLOCK: tl.constexpr, INNER: tl.constexpr):
    """``tile`` (rows, width) with each BLOCK channels multiplied by the orthonormal matrix: float32, same shape.

    INNER: width of the part done as a product, ``min(BLOCK, MAX_INNER)``; both are powers of two and divide width.
    """
    rows: tl.constexpr = tile.shape[0] * tile.shape[1] // INNER
    parts = tl.reshape(tile, (rows, INNER))
    parts = dot16(parts, _signs(INNER).to(tile.dtype), tl.zeros((rows, INNER), tl.float32))
    number = tl.arange(0, rows)
    for stage in tl.static_range(BLOCK // INNER):
        # powers of two below the number of parts in a block: one stage of butterflies each
        if stage > 0 and stage & (stage - 1) == 0:
            partner = tl.broadcast_to((number ^ stage)[:, None], (rows, INNER))
            other = tl.gather(parts, partner, 0)
            parts = tl.where((number & stage)[:, None] == 0, parts + other, other - parts)
    return tl.reshape(parts * (BLOCK**-0.5), (tile.shape[0], tile.shape[1]))


@triton.jit
def _signs(SIZE: tl.constexpr):
    """(SIZE, SIZE) of +-1: the parity of the bits that row and column number share."""
    number = tl.arange(0, SIZE)
    shared = number[:, None] & number[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return (1 - 2 * (shared & 1)).to(tl.float32)
