"""Pieces that the kernels share: tiles of inputs and of weights as numbers, and the low-rank term on top of a sum.

Triton inlines them. A pointer that is None, and every ``tl.constexpr``, is known when a kernel is compiled: what a
layer does not have costs it nothing.
"""

import triton
import triton.language as tl

from .environment import TritonEnvironment

IS_INTERPRETING = tl.constexpr(TritonEnvironment.read().is_interpreting)
"""Triton has decided by now: it is imported."""


@triton.jit
def dot16(left, right, total):
    """``total`` (m, n) float32 plus the product of 16-bit ``left`` (m, k) and ``right`` (k, n) on the tensor cores.

    The interpreter takes the bits of bfloat16 for integers: there both become float32, which changes no product.
    """
    if IS_INTERPRETING:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def load_inputs(x, input_scale, channel_order, rows, channels, num_rows, in_features):
    """Tile (len(rows), len(channels)) of a layer's input, gathered and divided; zeros beyond its ends.

    Rows count from where ``x`` points to: 32-bit places within a tile take half the registers of 64-bit ones.
    x: (num_rows, in_features); input_scale: (in_features,) float32 or None; channel_order: (in_features,) int32 or None
    """
    is_channel = channels < in_features
    source = channels
    if channel_order is not None:
        source = tl.load(channel_order + channels, mask=is_channel, other=0)
    places = rows[:, None] * in_features + source[None, :]
    values = tl.load(x + places, mask=(rows < num_rows)[:, None] & is_channel[None, :], other=0.0)
    if input_scale is not None:
        divisor = tl.load(input_scale + source, mask=is_channel, other=1.0)
        values = tl.div_rn(values.to(tl.float32), tl.broadcast_to(divisor[None, :], values.shape)).to(values.dtype)
    return values


@triton.jit
def load_codes(words, first_channel, columns, in_features, out_features, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes (BLOCK_K, len(columns)) int32 from words of 32 // BITS codes each; see ``pack``."""
    PER_WORD: tl.constexpr = 32 // BITS
    lines = first_channel // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    inside = (lines * PER_WORD < in_features)[:, None] & (columns < out_features)[None, :]
    packed = tl.load(words + lines[:, None] * out_features + columns[None, :], mask=inside, other=0)
    places = tl.arange(0, PER_WORD) * BITS
    codes = (packed[:, None, :] >> places[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (BLOCK_K, columns.shape[0]))


@triton.jit
def load_grid(
    grid, first_channel, columns, in_features, out_features, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Scales or zero points of a tile, float32: (1, len(columns)), or (BLOCK_K, len(columns)) of several groups.

    ``BLOCK_K`` divides ``GROUP_SIZE`` or is divided by it; ``GROUP_SIZE`` 0: one group.
    """
    if GROUP_SIZE == 0:
        values = tl.load(grid + columns, mask=columns < out_features, other=0.0)[None, :]
    elif GROUP_SIZE >= BLOCK_K:
        place = grid + (first_channel // GROUP_SIZE) * out_features + columns
        values = tl.load(place, mask=columns < out_features, other=0.0)[None, :]
    else:
        groups = first_channel // GROUP_SIZE + tl.arange(0, BLOCK_K // GROUP_SIZE)
        inside = (groups * GROUP_SIZE < in_features)[:, None] & (columns < out_features)[None, :]
        few = tl.load(grid + groups[:, None] * out_features + columns[None, :], mask=inside, other=0.0)
        shape: tl.constexpr = (BLOCK_K // GROUP_SIZE, GROUP_SIZE, columns.shape[0])
        values = tl.reshape(tl.broadcast_to(few[:, None, :], shape), (BLOCK_K, columns.shape[0]))
    return values.to(tl.float32)


@triton.jit
def load_weights(
    words, high_words, scale, zero, table, first_channel, columns, in_features, out_features,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights (BLOCK_K, len(columns)) float32. Of one group per output channel without its scale: it factors out."""
    codes = load_codes(words, first_channel, columns, in_features, out_features, STORAGE_BITS, BLOCK_K)
    if high_words is not None:
        high = load_codes(high_words, first_channel, columns, in_features, out_features, 1, BLOCK_K)
        codes = codes | (high << 2)
    if table is not None:
        values = tl.load(table + codes)
    else:
        # 2**23 + code is the float32 whose low bits are the code: cheaper than a conversion, and as exact
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True)
        if zero is None:
            values = values - (8388608.0 + (1 << (NUM_BITS - 1)))
        else:
            steps = load_grid(zero, first_channel, columns, in_features, out_features, GROUP_SIZE, BLOCK_K)
            values = values - (steps + 8388608.0)
    if GROUP_SIZE != 0:
        values = values * load_grid(scale, first_channel, columns, in_features, out_features, GROUP_SIZE, BLOCK_K)
    return values


@triton.jit
def low_rank(
    total, reduced, lora_up, components, columns, rank, out_features, BLOCK_M: tl.constexpr
):  # fmt: skip
    """``total`` (BLOCK_M, len(columns)) float32 plus ``reduced`` (BLOCK_M, len(components)) times the up-projection.

    lora_up: (rank, out_features), of the 16-bit type of ``reduced`` or int8, in steps of 2**-7; sums are float32
    """
    inside = (components < rank)[:, None] & (columns < out_features)[None, :]
    up = tl.load(lora_up + components[:, None] * out_features + columns[None, :], mask=inside, other=0)
    if up.dtype == tl.int8:
        up = up.to(tl.float32) * 0.0078125
    if BLOCK_M == 1:
        total += tl.sum(tl.trans(reduced).to(tl.float32) * up.to(tl.float32), 0)[None, :]
    else:
        total = dot16(reduced, up.to(reduced.dtype), total)
    return total


@triton.jit
def load_down(lora_down, components, channels, rank, in_features):
    """Tile (len(channels), len(components)) of ``lora_down`` (rank, in_features), as it is stored or int8 as float32.

    Codes go through float32, which the interpreter can turn into bfloat16.
    """
    inside = (channels < in_features)[:, None] & (components < rank)[None, :]
    down = tl.load(lora_down + components[None, :] * in_features + channels[:, None], mask=inside, other=0)
    if down.dtype == tl.int8:
        down = down.to(tl.float32)
    return down


@triton.jit
def keep_components(reduced, component_scale, row_ranks, rows, components, num_rows, rank):
    """``reduced`` (len(rows), len(components)) float32, scaled, with zeros where a row's own rank ends before.

    component_scale: (rank,) float32 or None: as it is; row_ranks: (num_rows,) int64 or None: all count
    """
    if component_scale is not None:
        reduced *= tl.load(component_scale + components, mask=components < rank, other=0.0)[None, :]
    if row_ranks is not None:
        limits = tl.load(row_ranks + rows, mask=rows < num_rows, other=0)
        reduced = tl.where(components[None, :] < limits[:, None], reduced, 0.0)
    return reduced


@triton.jit
def tile_of(program, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """(tile of rows, tile of columns) of a program, in bands of GROUP_M tiles of rows."""
    band = program // (GROUP_M * num_column_tiles)
    height = tl.minimum(num_row_tiles - band * GROUP_M, GROUP_M)
    place = program % (GROUP_M * num_column_tiles)
    return band * GROUP_M + place % height, place // height
