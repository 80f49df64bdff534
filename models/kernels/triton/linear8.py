"""Layers with quantized inputs: signed bytes times codes of 2 to 8 bits on the INT8 tensor cores.

    y = scale_x * sum over groups g of scale[g] * (codes @ (w - middle) - sums * (zero[g] - middle))
        + offset @ column_sums + reduced @ lora_up + bias

Products and sums of integers are exact (int32). Groups are scaled in float32, each once. Where neither weights nor
inputs have groups, one int32 sum runs over all channels and is scaled at the end.

Weights are read as stored and unpacked in registers; ``w - middle`` fits a signed byte for 8 bits too. Their zero point
is not subtracted before the product, because ``w - zero`` of 8 bits does not fit: it comes back as ``zero`` times the
sum of the codes, one multiplication an output and group, and the sums are written by the pass that quantizes. The
offset of inputs on an asymmetric 8-bit grid comes back the same way, as more components of the low-rank term:
``column_sums`` (input groups, out_features) float32, what the weights of each group add up to, made once at load.

A tensor core sums 32 channels at least. Groups of 16 take two products, each with half of the weights set to zero.

Few rows: the input channels are divided between programs, which write partial sums in float32; the low-rank term, the
offset and the bias belong to the first of them. ``add_parts_kernel`` adds them up in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .parts import keep_components, load_codes, load_grid, low_rank, tile_of


@triton.jit(do_not_specialize=["num_rows"])
def linear8_kernel(
    codes, input_scale, input_offset, sums, words, high_words, scale, zero, column_sums, bias, reduced, lora_up,
    row_ranks, output, num_rows, in_features, out_features, code_stride, num_input_groups, rank,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, INPUT_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """output (parts, num_rows, out_features): the whole layer, or partial sums of it.

    Inputs as ``inputs.IntegerInput`` has them, weights as ``pack.PackedWeight``, lora_up (rank, out_features) in
    the type of ``reduced`` or int8.
    GROUP_SIZE, INPUT_GROUP: channels that share a scale, 0: all of a row
    SEGMENT: the longest power of two that lies within groups of both, at most BLOCK_K; what ``sums`` are of
    Grid: tiles in one dimension (bands of GROUP_M tiles of rows), parts of the input channels.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = tile_of(tile, tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    num_blocks = tl.cdiv(in_features, BLOCK_K)
    blocks_per_part = tl.cdiv(num_blocks, tl.num_programs(1))
    first = part * blocks_per_part
    total = _product(
        codes, input_scale, sums, words, high_words, scale, zero, rows, columns,
        first, tl.minimum(first + blocks_per_part, num_blocks), num_rows, in_features, out_features, code_stride,
        NUM_BITS, STORAGE_BITS, GROUP_SIZE, INPUT_GROUP, SEGMENT, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    is_row = rows < num_rows
    if GROUP_SIZE == 0:
        total *= load_grid(scale, 0, columns, in_features, out_features, 0, 1)
    if INPUT_GROUP == 0:
        total *= tl.load(input_scale + rows, mask=is_row, other=0.0)[:, None]
    if part == 0:
        if input_offset is not None:
            for group in tl.range(0, num_input_groups):
                offset = tl.load(input_offset + group * num_rows + rows, mask=is_row, other=0.0)
                column = tl.load(column_sums + group * out_features + columns, mask=columns < out_features, other=0.0)
                total += offset[:, None] * column[None, :]
        if lora_up is not None:
            for start in tl.range(0, rank, BLOCK_R, num_stages=1):
                components = start + tl.arange(0, BLOCK_R)
                inside = is_row[:, None] & (components < rank)[None, :]
                few = tl.load(reduced + rows[:, None] * rank + components[None, :], mask=inside, other=0.0)
                few = keep_components(few.to(tl.float32), None, row_ranks, rows, components, num_rows, rank)
                few = few.to(reduced.dtype.element_ty)
                total = low_rank(total, few, lora_up, components, columns, rank, out_features, BLOCK_M)
        if bias is not None:
            total += tl.load(bias + columns, mask=columns < out_features, other=0.0).to(tl.float32)[None, :]
    places = (part.to(tl.int64) * num_rows + rows)[:, None] * out_features + columns[None, :]
    inside = is_row[:, None] & (columns < out_features)[None, :]
    tl.store(output + places, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    codes, input_scale, sums, words, high_words, scale, zero, rows, columns, first_block, last_block,
    num_rows, in_features, out_features, code_stride,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, INPUT_GROUP: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Codes times weights over some blocks of channels, with the scales of groups: (BLOCK_M, BLOCK_N) float32."""
    HAS_GROUPS: tl.constexpr = GROUP_SIZE != 0 or INPUT_GROUP != 0
    MIDDLE: tl.constexpr = 1 << (NUM_BITS - 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if HAS_GROUPS else tl.int32)
    row_sums = tl.zeros((BLOCK_M,), tl.int32)
    is_row = rows < num_rows
    lines = codes + rows.to(tl.int64)[:, None] * code_stride
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        first_channel = block * BLOCK_K
        inputs = tl.load(lines + (first_channel + tl.arange(0, BLOCK_K))[None, :], mask=is_row[:, None], other=0)
        weights = load_codes(words, first_channel, columns, in_features, out_features, STORAGE_BITS, BLOCK_K)
        if high_words is not None:
            weights |= load_codes(high_words, first_channel, columns, in_features, out_features, 1, BLOCK_K) << 2
        weights = (weights - MIDDLE).to(tl.int8)
        for index in tl.static_range(BLOCK_K // SEGMENT):
            segment = block * (BLOCK_K // SEGMENT) + index
            chosen = weights
            if SEGMENT < BLOCK_K:
                chosen = tl.where((tl.arange(0, BLOCK_K) // SEGMENT == index)[:, None], weights, 0)
            if not HAS_GROUPS:
                total = tl.dot(inputs, chosen, total, out_dtype=tl.int32)
                if zero is not None:
                    row_sums += tl.load(sums + segment * num_rows + rows, mask=is_row, other=0)
            else:
                # sums over a segment are below 2**24: exact as float32
                part = tl.dot(inputs, chosen, out_dtype=tl.int32).to(tl.float32)
                if zero is not None:
                    few = tl.load(sums + segment * num_rows + rows, mask=is_row, other=0).to(tl.float32)
                    steps = load_grid(zero, segment * SEGMENT, columns, in_features, out_features, GROUP_SIZE, SEGMENT)
                    part -= few[:, None] * (steps - MIDDLE)
                if GROUP_SIZE != 0:
                    part *= load_grid(scale, segment * SEGMENT, columns, in_features, out_features, GROUP_SIZE, SEGMENT)
                if INPUT_GROUP != 0:
                    group = segment * SEGMENT // INPUT_GROUP
                    part *= tl.load(input_scale + group * num_rows + rows, mask=is_row, other=0.0)[:, None]
                total += part
    if not HAS_GROUPS:
        if zero is not None:
            steps = load_grid(zero, 0, columns, in_features, out_features, 0, 1).to(tl.int32)
            total -= row_sums[:, None] * (steps - MIDDLE)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def add_parts_kernel(parts, output, size, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """output (size,): the sum of parts (NUM_PARTS, size) float32, first to last."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts + part * size + places, mask=places < size, other=0.0)
    tl.store(output + places, total.to(output.dtype.element_ty), mask=places < size)
