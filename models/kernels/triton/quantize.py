"""The input of a linear layer in one pass: divide, gather, rotate, round to INT, multiply with ``lora_down``.

One program takes whole tokens. It reads them once from memory, in the gathered order (SERQ's reordering costs no pass
of its own), and while they are in registers writes all that the product needs:

    codes     signed bytes, a quarter to a half of what a 16-bit input would be read as by every column of tiles
    scale     of each token or group, float32
    offset    of asymmetric 8-bit grids only. They span 255 steps around a zero that may lie anywhere, so the lowest
              step is moved to -128; ``x' = scale * code + offset``. Narrower grids fit a signed byte with zero at 0
    sums      of the codes in each segment of channels: what a zero point of the weights is multiplied with
    reduced   ``x' @ lora_down.T`` (or the first ``rank`` channels of x'): the low-rank term's input. Of INT8 factors
              times ``component_scale``: before it is rounded, so that float16 need not hold sums of whole codes

Without quantization it writes x' itself, in the input's type. The low-rank term sees quantized inputs, rounded to the
layer's type, as the reference has it.

Few tokens: a program holds one token whole and computes some of the rank-r components, so that a decode step is spread
over ``num_tokens * rank / 8`` programs. Many tokens: a program walks through 16 of them, twice where a token has one
scale (the second time from the cache), and ``lora_down`` meets them on the tensor cores.
"""

import triton
import triton.language as tl

from .grids import choose_grid, group_range, round_to_grid
from .hadamard import rotate_tile
from .parts import dot16, load_down


@triton.jit
def input_kernel(
    x, divisor, channel_order, lora_down, component_scale, out, scale_out, offset_out, sums_out, reduced_out,
    num_tokens, x_stride, out_stride, in_features, rank, clip_ratio,
    ROTATION: tl.constexpr, INNER: tl.constexpr, FORMAT: tl.constexpr, NUM_BITS: tl.constexpr,
    IS_SYMMETRIC: tl.constexpr, IS_CEIL: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    IS_INTEGER: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens ``BLOCK_M * program_id(0)`` on, components ``CHUNK * program_id(1)`` on; see ``FusedInput`` for shapes.

    FORMAT:   of the grid: ``none``, ``int``, ``mxint``
    GROUP:    channels that share a scale, 0: all of a token
    SEGMENT:  channels of one of ``sums``, 0: none are asked for
    CHUNK:    components of ``lora_down`` for each program, 0: there is no ``lora_down``
    IS_WHOLE: BLOCK_K holds all channels of a token
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # programs of further components store those alone
    is_stored = rows < num_tokens * (tl.program_id(1) == 0)
    num_steps = 1 if IS_WHOLE else tl.cdiv(out_stride, BLOCK_K)
    if IS_WHOLE:
        tile = _load_tile(x, divisor, channel_order, rows, 0, num_tokens, x_stride, in_features,
                          ROTATION, INNER, BLOCK_K)  # fmt: skip
    if FORMAT != "none" and GROUP == 0:
        low = tl.zeros((BLOCK_M, 1, 1), tl.float32)
        high, flaw = low, low
        for step in range(num_steps):
            if not IS_WHOLE:
                tile = _load_tile(x, divisor, channel_order, rows, step * BLOCK_K, num_tokens, x_stride, in_features,
                                  ROTATION, INNER, BLOCK_K)  # fmt: skip
            tile_low, tile_high, tile_flaw = group_range(tl.reshape(tile.to(tl.float32), (BLOCK_M, 1, BLOCK_K)))
            low, high, flaw = tl.minimum(low, tile_low), tl.maximum(high, tile_high), flaw + tile_flaw
        scale, lowest = choose_grid(low, high, clip_ratio, FORMAT, NUM_BITS, IS_SYMMETRIC, IS_CEIL)
        _store_grid(scale + flaw, lowest, rows, is_stored, 0, 1, scale_out, offset_out, num_tokens)
    reduced = tl.zeros((BLOCK_M, CHUNK if CHUNK else 1), tl.float32)
    for step in range(num_steps):
        if not IS_WHOLE:
            tile = _load_tile(x, divisor, channel_order, rows, step * BLOCK_K, num_tokens, x_stride, in_features,
                              ROTATION, INNER, BLOCK_K)  # fmt: skip
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        is_code = is_stored[:, None] & (columns < out_stride)[None, :]
        place = rows[:, None].to(tl.int64) * out_stride + columns[None, :]
        values = tile
        if FORMAT != "none":
            width: tl.constexpr = GROUP if GROUP else BLOCK_K
            groups = tl.reshape(tile.to(tl.float32), (BLOCK_M, BLOCK_K // width, width))
            if GROUP:
                low, high, flaw = group_range(groups)
                scale, lowest = choose_grid(low, high, clip_ratio, FORMAT, NUM_BITS, IS_SYMMETRIC, IS_CEIL)
                _store_grid(scale + flaw, lowest, rows, is_stored, step * (BLOCK_K // width), in_features // width,
                            scale_out, offset_out, num_tokens)  # fmt: skip
            steps = round_to_grid(groups, scale, lowest, NUM_BITS, IS_SYMMETRIC)
            values = tl.reshape(steps * (scale + flaw), (BLOCK_M, BLOCK_K)).to(tile.dtype)
            if IS_INTEGER:
                codes = steps - lowest - 128 if offset_out is not None else steps
                codes = tl.where((columns < in_features)[None, :], tl.reshape(codes, (BLOCK_M, BLOCK_K)), 0.0)
                codes = codes.to(tl.int32)
                tl.store(out + place, codes.to(tl.int8), mask=is_code)
                if SEGMENT:
                    _store_sums(codes, rows, is_stored, step, sums_out, num_tokens, out_stride, SEGMENT)
        if not IS_INTEGER:
            tl.store(out + place, values, mask=is_code)
        if reduced_out is not None:
            if CHUNK == 0:
                is_leading = is_code & (columns < rank)[None, :]
                tl.store(reduced_out + rows[:, None] * rank + columns[None, :], values, mask=is_leading)
            elif not IS_WHOLE:
                components = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
                down = load_down(lora_down, components, columns, rank, in_features)
                reduced = dot16(values, down.to(values.dtype), reduced)
            else:
                for index in tl.static_range(CHUNK):
                    component = tl.program_id(1) * CHUNK + index
                    is_real = component < rank
                    inside = columns < in_features * is_real
                    down = tl.load(lora_down + component * in_features + columns, mask=inside, other=0)
                    part = tl.sum(values.to(tl.float32) * down.to(tl.float32)[None, :], 1)
                    if component_scale is not None:
                        part *= tl.load(component_scale + component, mask=is_real, other=0.0)
                    tl.store(reduced_out + rows * rank + component, part, mask=rows < num_tokens * is_real)
    if CHUNK and not IS_WHOLE:
        components = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = (rows < num_tokens)[:, None] & (components < rank)[None, :]
        if component_scale is not None:
            reduced *= tl.load(component_scale + components, mask=components < rank, other=0.0)[None, :]
        tl.store(reduced_out + rows[:, None] * rank + components[None, :], reduced, mask=inside)


@triton.jit
def _load_tile(
    x, divisor, channel_order, rows, start, num_tokens, x_stride, in_features,
    ROTATION: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels ``start`` on of ``rows``, (BLOCK_M, BLOCK_K): divided, gathered, rotated, each rounded to x's type."""
    columns = start + tl.arange(0, BLOCK_K)
    is_channel = columns < in_features
    source = columns
    if channel_order is not None:
        source = tl.load(channel_order + columns, mask=is_channel, other=0)
    inside = (rows < num_tokens)[:, None] & is_channel[None, :]
    tile = tl.load(x + rows[:, None].to(tl.int64) * x_stride + source[None, :], mask=inside, other=0.0)
    if divisor is not None:
        by = tl.load(divisor + columns, mask=is_channel, other=1.0)
        tile = tl.div_rn(tile.to(tl.float32), by[None, :]).to(tile.dtype)
    if ROTATION:
        tile = rotate_tile(tile, ROTATION, INNER).to(tile.dtype)
    return tile


@triton.jit
def _store_grid(scale, lowest, rows, is_stored, first, num_groups, scale_out, offset_out, num_tokens):
    """Scales and offsets of groups ``first`` on, (groups, tokens) in memory."""
    if scale_out is not None:
        groups = first + tl.arange(0, scale.shape[1])
        inside = is_stored[:, None] & (groups < num_groups)[None, :]
        place = groups[None, :] * num_tokens + rows[:, None]
        tl.store(scale_out + place, tl.reshape(scale, (scale.shape[0], scale.shape[1])), mask=inside)
        if offset_out is not None:
            offset = tl.reshape(scale * (lowest + 128), (scale.shape[0], scale.shape[1]))
            tl.store(offset_out + place, offset, mask=inside)


@triton.jit
def _store_sums(codes, rows, is_stored, step, sums_out, num_tokens, padded_features, SEGMENT: tl.constexpr):
    """Sums of the codes of each SEGMENT channels, (segments, tokens) in memory."""
    count: tl.constexpr = codes.shape[1] // SEGMENT
    sums = tl.sum(tl.reshape(codes, (codes.shape[0], count, SEGMENT)), 2)
    segments = step * count + tl.arange(0, count)
    inside = is_stored[:, None] & (segments < padded_features // SEGMENT)[None, :]
    tl.store(sums_out + segments[None, :] * num_tokens + rows[:, None], sums, mask=inside)
