"""Attention over the paged key-value cache, for one or a few new tokens per sequence.

A decode step reads every key and value of its sequences once, and that is all that takes time. So

- one program serves all query heads of one key-value head: each key and value is loaded once for the whole group. The
  group's heads, times a draft's rows, are the rows of one tensor-core product, 16 at least;
- a context is cut into splits that different programs read, so that a single long sequence fills the card as well. How
  a sequence is cut follows from its own length alone: what it gets does not depend on company. A second pass adds the
  splits up, weighted by their exponentials (Flash-Decoding);
- block tables, lengths and rows are read on the device: a launch depends on shapes only, and can be recorded.

Scores, exponentials and sums are float32. 8-bit keys are multiplied as the integers that they are, which is exact, and
their scales go on the scores; 8-bit values are multiplied by their scales, and rounded to the type of the queries, in
which the weights come too: weights times scales, the cheaper way, would be lost below float16's smallest number.

A program holds TILE_ROWS x CHANNELS sums and a tile each of keys and values: TILE_TOKENS x CHANNELS, 16 kB in 16 bits.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0915, PLR0917, C901
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

HOST_MADE = ["table_ptr", "context_ptr", "start_ptr", "rows_ptr"]
"""Parts of one buffer, aligned as it happens: a kernel for each case would be compiled in the middle of a request."""


@triton.jit
def _split_length(seen, NUM_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Tokens of each split but the last, whole tiles."""
    length = tl.maximum(tl.cdiv(seen, NUM_SPLITS), MIN_SPLIT)
    return tl.cdiv(length, TILE_TOKENS) * TILE_TOKENS


@triton.jit(do_not_specialize=["table_width"], do_not_specialize_on_alignment=HOST_MADE)
def attend_split(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr,
    table_ptr, context_ptr, start_ptr, rows_ptr,
    output_ptr, partial_ptr, weight_ptr,
    table_width, score_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and key-value head; grid (num_sequences, KV_HEADS, NUM_SPLITS).

    output_ptr:  (num_tokens, heads, HEAD_DIM), written where there is one split only
    partial_ptr: (num_sequences, MAX_ROWS, heads, NUM_SPLITS, HEAD_DIM) float32, otherwise: each split's own result
    weight_ptr:  (num_sequences, MAX_ROWS, heads, NUM_SPLITS) float32, and the base-2 logarithm of its exponentials' sum
    score_scale: base-2 logarithm of e over the square root of HEAD_DIM
    WINDOW:      0: none
    IS_WIDE:     products of float32, for Triton's interpreter, which multiplies bfloat16 as if it were integers
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context, num_rows = tl.load(context_ptr + sequence), tl.load(rows_ptr + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - num_rows - WINDOW + 1, 0)
    length = _split_length(context - low, NUM_SPLITS, MIN_SPLIT, TILE_TOKENS)
    begin = low + split * length
    if begin >= context:
        return
    end = tl.minimum(begin + length, context)

    tile_rows, channels = tl.arange(0, TILE_ROWS), tl.arange(0, CHANNELS)
    row, heads = tile_rows // GROUP, kv_head * GROUP + tile_rows % GROUP
    is_row, is_channel = row < num_rows, channels < HEAD_DIM
    place = (tl.load(start_ptr + sequence) + row).to(tl.int64) * (KV_HEADS * GROUP) + heads
    dtype = query_ptr.dtype.element_ty
    query = tl.load(
        query_ptr + place[:, None] * HEAD_DIM + channels[None, :],
        mask=is_row[:, None] & is_channel[None, :],
        other=0.0,
    )
    if IS_WIDE:
        query = query.to(tl.float32)
    position = context - num_rows + row

    highest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    sums = tl.zeros((TILE_ROWS, CHANNELS), tl.float32)
    for start in range(begin, end, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        is_token = tokens < end
        block = tl.load(table_ptr + sequence.to(tl.int64) * table_width + tokens // BLOCK_SIZE, mask=is_token, other=0)
        vector = (block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE) * KV_HEADS + kv_head
        key = tl.load(
            key_ptr + vector[None, :] * HEAD_DIM + channels[:, None],
            mask=is_token[None, :] & is_channel[:, None],
            other=0,
        )
        if HAS_SCALES:  # every code is a number of any of the types
            key = key.to(tl.float32)
        key = key.to(dtype)
        if IS_WIDE:
            key = key.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * score_scale
        if HAS_SCALES:
            scores *= tl.load(key_scale_ptr + vector, mask=is_token, other=0.0)[None, :]
        is_seen = is_token[None, :] & (tokens[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen &= tokens[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet: minus infinity less itself would be no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, fading = tl.exp2(scores - base[:, None]), tl.exp2(highest - base)
        total = total * fading + tl.sum(weights, 1)
        value = tl.load(
            value_ptr + vector[:, None] * HEAD_DIM + channels[None, :],
            mask=is_token[:, None] & is_channel[None, :],
            other=0,
        )
        if HAS_SCALES:
            value = value.to(tl.float32) * tl.load(value_scale_ptr + vector, mask=is_token, other=0.0)[:, None]
        weights, value = weights.to(dtype), value.to(dtype)
        if IS_WIDE:
            weights, value = weights.to(tl.float32), value.to(tl.float32)
        sums = tl.dot(weights, value, sums * fading[:, None], input_precision="ieee")
        highest = higher

    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    mask = is_row[:, None] & is_channel[None, :]
    if NUM_SPLITS == 1:
        target = output_ptr + place[:, None] * HEAD_DIM + channels[None, :]
        tl.store(target, result.to(output_ptr.dtype.element_ty), mask=mask)
    else:
        part = ((sequence.to(tl.int64) * MAX_ROWS + row) * (KV_HEADS * GROUP) + heads) * NUM_SPLITS + split
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + channels[None, :], result, mask=mask)
        # Nothing seen: minus infinity.
        tl.store(weight_ptr + part, highest + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=is_row)


@triton.jit(do_not_specialize_on_alignment=HOST_MADE[1:])
def add_splits(
    partial_ptr, weight_ptr, context_ptr, start_ptr, rows_ptr, output_ptr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    TILE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    MAX_ROWS: tl.constexpr, TILE_SPLITS: tl.constexpr,
):  # fmt: skip
    """All splits of one row and head added up; grid (num_sequences, heads, MAX_ROWS)."""
    sequence, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context, num_rows = tl.load(context_ptr + sequence), tl.load(rows_ptr + sequence)
    if row >= num_rows:
        return
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - num_rows - WINDOW + 1, 0)
    num_used = tl.cdiv(context - low, _split_length(context - low, NUM_SPLITS, MIN_SPLIT, TILE_TOKENS))
    place = (tl.load(start_ptr + sequence) + row).to(tl.int64) * (KV_HEADS * GROUP) + head
    first_part = ((sequence.to(tl.int64) * MAX_ROWS + row) * (KV_HEADS * GROUP) + head) * NUM_SPLITS
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM

    every_split = tl.arange(0, NUM_SPLITS)
    is_used = every_split < num_used
    weights = tl.load(weight_ptr + first_part + every_split, mask=is_used, other=float("-inf"))
    highest = tl.max(weights, 0)
    total = tl.sum(tl.exp2(weights - highest), 0)
    sums = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, num_used, TILE_SPLITS):
        splits = first + tl.arange(0, TILE_SPLITS)
        is_split = splits < num_used
        part = first_part + splits
        weight = tl.exp2(tl.load(weight_ptr + part, mask=is_split, other=float("-inf")) - highest)
        result = tl.load(
            partial_ptr + part[:, None] * HEAD_DIM + channels[None, :],
            mask=is_split[:, None] & is_channel[None, :],
            other=0.0,
        )
        sums += tl.sum(result * weight[:, None], 0)
    target = output_ptr + place * HEAD_DIM + channels
    tl.store(target, (sums / total).to(output_ptr.dtype.element_ty), mask=is_channel)
