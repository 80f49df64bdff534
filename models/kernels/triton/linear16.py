"""Weight-only layers: 16-bit inputs times codes of 2 to 8 bits, with the low-rank term inside. Sums are float32.

    y = x_c @ W^T + bias + (x_c @ lora_down^T) @ lora_up^T,    x_c = (x / input_scale)[:, channel_order]

Few rows: reading the weight is all the time there is, and one column of tiles does not fill the card. ``split_kernel``
divides the input channels between programs, which write partial sums. The rows of ``lora_down`` are more columns of the
same product, so the down-projection costs neither a launch nor another reading of x. ``reduce_kernel`` adds the parts
in a fixed order (no atomics: the same input gives the same bits on every run), then the up-projection and the bias.

Many rows: ``prepare_kernel`` reads x once, writes x_c where that differs from x, and the down-projection, in parts too,
because a few hundred rows do not fill the card either. ``tiled_kernel`` adds the parts up in its epilogue. Doing the
down-projection inside ``tiled_kernel`` instead would repeat it in every column of tiles: at rank 32 and tiles 128 wide
a quarter more products, against one more reading of an x that the layer before has just left in the cache.

Weights become numbers in float32 and are rounded once to the inputs' type for the tensor cores, as in the reference
backend; a single row is multiplied in float32 on the ordinary cores, without that rounding. ``GROUP_SIZE`` 0 means one
scale per output channel, which is applied to the sum.
"""

import triton
import triton.language as tl

from .parts import dot16, keep_components, load_down, load_grid, load_inputs, load_weights, low_rank, tile_of


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What products are added to: (BLOCK_M, BLOCK_N); of one row (BLOCK_K, BLOCK_N), to be summed at the end."""
    HEIGHT: tl.constexpr = BLOCK_K if BLOCK_M == 1 else BLOCK_M
    return tl.zeros((HEIGHT, BLOCK_N), dtype=tl.float32)


@triton.jit
def _add_product(total, inputs, weights, BLOCK_M: tl.constexpr):
    """``total`` plus ``inputs`` (BLOCK_M, BLOCK_K) times ``weights`` (BLOCK_K, BLOCK_N) float32."""
    if BLOCK_M == 1:
        total += tl.trans(inputs).to(tl.float32) * weights.to(tl.float32)
    else:
        total = dot16(inputs, weights.to(inputs.dtype), total)
    return total


@triton.jit
def _summed(total, BLOCK_M: tl.constexpr):
    if BLOCK_M == 1:
        total = tl.sum(total, 0)[None, :]
    return total


@triton.jit
def _product(
    x, input_scale, channel_order, words, high_words, scale, zero, table,
    rows, columns, first_block, last_block, num_rows, in_features, out_features,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows times columns of the weight over some blocks of channels: (BLOCK_M, BLOCK_N) float32."""
    total = _zeros(BLOCK_M, BLOCK_N, BLOCK_K)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        first_channel = block * BLOCK_K
        channels = first_channel + tl.arange(0, BLOCK_K)
        inputs = load_inputs(x, input_scale, channel_order, rows, channels, num_rows, in_features)
        weights = load_weights(
            words, high_words, scale, zero, table, first_channel, columns, in_features, out_features,
            NUM_BITS, STORAGE_BITS, GROUP_SIZE, BLOCK_K,
        )  # fmt: skip
        total = _add_product(total, inputs, weights, BLOCK_M)
    return _summed(total, BLOCK_M)


@triton.jit
def _down_product(
    x, input_scale, channel_order, lora_down, rows, components, first_block, last_block, num_rows, in_features, rank,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows times rows ``components`` of ``lora_down`` (rank, in_features) over some blocks of channels."""
    total = _zeros(BLOCK_M, BLOCK_R, BLOCK_K)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inputs = load_inputs(x, input_scale, channel_order, rows, channels, num_rows, in_features)
        down = load_down(lora_down, components, channels, rank, in_features)
        total = _add_product(total, inputs, down, BLOCK_M)
    return _summed(total, BLOCK_M)


@triton.jit
def _finish(total, bias, output, rows, columns, num_rows, out_features):
    """Write ``total`` with its bias."""
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < out_features, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None] * out_features + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    tl.store(output + places, total.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def split_kernel(
    x, input_scale, channel_order, words, high_words, scale, zero, table, lora_down, parts,
    num_rows, in_features, out_features, rank,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """parts[s] (num_rows, out_features + rank) float32: both products over the s-th part of the input channels.

    Grid: tiles of ``lora_down`` then of the weight, tiles of rows, parts. ``rank`` is 0 without a ``lora_down``.
    """
    tile, part = tl.program_id(0), tl.program_id(2)
    first_row = tl.program_id(1) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    blocks_per_part = tl.cdiv(tl.cdiv(in_features, BLOCK_K), tl.num_programs(2))
    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, tl.cdiv(in_features, BLOCK_K))
    width = out_features + rank
    parts += (part.to(tl.int64) * num_rows + first_row) * width
    x += first_row.to(tl.int64) * in_features
    num_rows -= first_row
    num_down_tiles = 0
    if lora_down is not None:
        num_down_tiles = tl.cdiv(rank, BLOCK_R)
        if tile < num_down_tiles:
            components = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            reduced = _down_product(
                x, input_scale, channel_order, lora_down, rows, components, first, last, num_rows, in_features, rank,
                BLOCK_M, BLOCK_R, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
            inside = (rows < num_rows)[:, None] & (components < rank)[None, :]
            tl.store(parts + rows[:, None] * width + out_features + components[None, :], reduced, mask=inside)
    if tile >= num_down_tiles:
        columns = (tile - num_down_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _product(
            x, input_scale, channel_order, words, high_words, scale, zero, table,
            rows, columns, first, last, num_rows, in_features, out_features,
            NUM_BITS, STORAGE_BITS, GROUP_SIZE, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
        tl.store(parts + rows[:, None] * width + columns[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def reduce_kernel(
    parts, x, input_scale, channel_order, scale, bias, lora_up, component_scale, row_ranks, output,
    num_rows, in_features, out_features, down_rank, rank,
    GROUP_SIZE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum of the parts of ``split_kernel``, times the scale per output channel, plus low-rank term and bias.

    down_rank: columns of ``parts`` beyond the layer's own; 0: the low-rank term reads x itself (SERQ)
    Grid: tiles of output channels, tiles of rows.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row, rows = tl.program_id(1) * BLOCK_M, tl.arange(0, BLOCK_M)
    width = out_features + down_rank
    lines = (tl.arange(0, SPLIT)[:, None, None] * num_rows + rows[None, :, None]) * width
    parts += first_row.to(tl.int64) * width
    x += first_row.to(tl.int64) * in_features
    output += first_row.to(tl.int64) * out_features
    if row_ranks is not None:
        row_ranks += first_row
    num_rows -= first_row
    is_row = (rows < num_rows)[None, :, None]
    total = tl.sum(tl.load(parts + lines + columns, mask=is_row & (columns < out_features), other=0.0), 0)
    if GROUP_SIZE == 0:
        total *= load_grid(scale, 0, columns, in_features, out_features, 0, 1)
    if lora_up is not None:
        for start in tl.range(0, rank, BLOCK_R, num_stages=1):
            components = start + tl.arange(0, BLOCK_R)
            if down_rank == 0:
                reduced = load_inputs(x, input_scale, channel_order, rows, components, num_rows, in_features)
                reduced = tl.where((components < rank)[None, :], reduced.to(tl.float32), 0.0)
            else:
                inside = is_row & (components < rank)
                reduced = tl.sum(tl.load(parts + lines + out_features + components, mask=inside, other=0.0), 0)
            reduced = keep_components(reduced, component_scale, row_ranks, rows, components, num_rows, rank)
            reduced = reduced.to(x.dtype.element_ty)
            total = low_rank(total, reduced, lora_up, components, columns, rank, out_features, BLOCK_M)
    _finish(total, bias, output, rows, columns, num_rows, out_features)


@triton.jit(do_not_specialize=["num_rows"])
def prepare_kernel(
    x, input_scale, channel_order, lora_down, prepared, reduced_parts, num_rows, in_features, rank,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """x_c in ``prepared`` (num_rows, in_features), or None where x is x_c; x_c @ lora_down^T in ``reduced_parts``.

    reduced_parts: (parts, num_rows, rank) float32, to be added up; None: there is no ``lora_down``
    Grid: tiles of rows, parts, tiles of the rank (1 without a ``lora_down``).
    """
    first_row, rows = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    x += first_row.to(tl.int64) * in_features
    if prepared is not None:
        prepared += first_row.to(tl.int64) * in_features
    if reduced_parts is not None:
        reduced_parts += (part.to(tl.int64) * num_rows + first_row) * rank
    num_rows -= first_row
    blocks_per_part = tl.cdiv(tl.cdiv(in_features, BLOCK_K), tl.num_programs(1))
    components = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = part * blocks_per_part
    last = tl.minimum(first + blocks_per_part, tl.cdiv(in_features, BLOCK_K))
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inputs = load_inputs(x, input_scale, channel_order, rows, channels, num_rows, in_features)
        if prepared is not None:
            if tl.program_id(2) == 0:
                inside = (rows < num_rows)[:, None] & (channels < in_features)[None, :]
                tl.store(prepared + rows[:, None] * in_features + channels[None, :], inputs, mask=inside)
        if lora_down is not None:
            down = load_down(lora_down, components, channels, rank, in_features)
            total = dot16(inputs, down.to(inputs.dtype), total)
    if lora_down is not None:
        places = rows[:, None] * rank + components[None, :]
        tl.store(reduced_parts + places, total, mask=(rows < num_rows)[:, None] & (components < rank)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def tiled_kernel(
    x, words, high_words, scale, zero, table, bias, reduced_parts, lora_up, component_scale, row_ranks, output,
    num_rows, in_features, out_features, rank, num_parts,
    NUM_BITS: tl.constexpr, STORAGE_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The whole layer for inputs that are prepared.

    reduced_parts: the ``num_parts`` that ``prepare_kernel`` leaves; None: the low-rank term reads x itself (SERQ)
    Grid: all tiles in one dimension; GROUP_M tiles of rows take turns at a tile of columns while it is in the cache.
    """
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    row_tile, column_tile = tile_of(tl.program_id(0), num_row_tiles, num_column_tiles, GROUP_M)
    first_row, rows = row_tile * BLOCK_M, tl.arange(0, BLOCK_M)
    x += first_row.to(tl.int64) * in_features
    output += first_row.to(tl.int64) * out_features
    part_length = num_rows * rank
    if reduced_parts is not None:
        reduced_parts += first_row * rank
    if row_ranks is not None:
        row_ranks += first_row
    num_rows -= first_row
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(
        x, None, None, words, high_words, scale, zero, table,
        rows, columns, 0, tl.cdiv(in_features, BLOCK_K), num_rows, in_features, out_features,
        NUM_BITS, STORAGE_BITS, GROUP_SIZE, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    if GROUP_SIZE == 0:
        total *= load_grid(scale, 0, columns, in_features, out_features, 0, 1)
    if lora_up is not None:
        for start in tl.range(0, rank, BLOCK_R, num_stages=1):
            components = start + tl.arange(0, BLOCK_R)
            inside = (rows < num_rows)[:, None] & (components < rank)[None, :]
            if reduced_parts is None:
                places = rows[:, None] * in_features + components[None, :]
                reduced = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
            else:
                reduced = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                places = rows[:, None] * rank + components[None, :]
                for part in tl.range(0, num_parts, num_stages=1):
                    reduced += tl.load(reduced_parts + part * part_length + places, mask=inside, other=0.0)
            reduced = keep_components(reduced, component_scale, row_ranks, rows, components, num_rows, rank)
            reduced = reduced.to(x.dtype.element_ty)
            total = low_rank(total, reduced, lora_up, components, columns, rank, out_features, BLOCK_M)
    _finish(total, bias, output, rows, columns, num_rows, out_features)
