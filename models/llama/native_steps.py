"""From a batch to the native kernels' steps: rows in portions of bounded size, block tables as one matrix."""

from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.native.program import StepInputs
from ..kernels.native.structs import CACHE_BLOCK
from .batch import Batch, SequenceSpan
from .native_cache import NativeKVCache


def num_blocks_for(num_tokens: int) -> int:
    """Cache blocks that ``num_tokens`` tokens take."""
    return -(-num_tokens // CACHE_BLOCK)


def given_tables(batch: Batch, cache: NativeKVCache) -> list[Sequence[int]]:
    """The spans' own block tables.

    Raises:
        ValueError: a span without one, or one that is too short or leads out of the cache.
    """
    tables = []
    for span in batch.spans:
        if span.block_table is None:
            raise ValueError("a batch that runs with the native key-value cache needs a block table in every span")
        table = span.block_table[: num_blocks_for(span.context_len)]
        if len(table) < num_blocks_for(span.context_len):
            raise ValueError(f"{len(table)} cache blocks do not hold {span.context_len} tokens")
        if min(table) < 0 or max(table) >= cache.num_blocks:
            raise ValueError(f"a block table leads out of a cache of {cache.num_blocks} blocks")
        tables.append(table)
    return tables


def fresh_tables(batch: Batch) -> list[Sequence[int]]:
    """Block tables for whole sequences, one behind the other.

    Raises:
        ValueError: a span with earlier context, which only a cache could hold.
    """
    tables: list[Sequence[int]] = []
    start = 0
    for span in batch.spans:
        if span.context_len > span.num_tokens:
            raise ValueError("a span with earlier context needs the key-value cache that holds it")
        end = start + num_blocks_for(span.num_tokens)
        tables.append(range(start, end))
        start = end
    return tables


def steps_of(batch: Batch, tables: Sequence[Sequence[int]], max_rows: int) -> Iterator[StepInputs]:
    """``batch`` in steps of at most ``max_rows`` rows, in row order; what a row gives does not depend on the cut."""
    token_ids, positions = batch.token_ids.to(torch.int32), batch.positions.to(torch.int32)
    first = 0
    members: list[tuple[SequenceSpan, Sequence[int]]] = []
    num_rows = 0
    for span, table in zip(batch.spans, tables, strict=True):
        for piece in _pieces(span, num_rows, max_rows):
            if num_rows + piece.num_tokens > max_rows:
                yield _step(token_ids, positions, first, members)
                first, members, num_rows = first + num_rows, [], 0
            members.append((piece, table))
            num_rows += piece.num_tokens
    if members:
        yield _step(token_ids, positions, first, members)


def _pieces(span: SequenceSpan, num_rows: int, max_rows: int) -> Iterator[SequenceSpan]:
    """``span`` cut where a step is full: at what is left of the present one, then at whole steps."""
    done = 0
    room = max_rows - num_rows or max_rows
    while done < span.num_tokens:
        num_tokens = min(room, span.num_tokens - done)
        context_len = span.context_len - span.num_tokens + done + num_tokens
        yield SequenceSpan(span.start + done, num_tokens, context_len)
        done += num_tokens
        room = max_rows


def _step(
    token_ids: Tensor, positions: Tensor, first: int, members: Sequence[tuple[SequenceSpan, Sequence[int]]]
) -> StepInputs:
    starts, context_lens = array("i", [0]), array("i")
    for span, _ in members:
        starts.append(starts[-1] + span.num_tokens)
        context_lens.append(span.context_len)
    rows = slice(first, first + starts[-1])
    return StepInputs(
        token_ids[rows],
        positions[rows],
        torch.frombuffer(starts, dtype=torch.int32),
        torch.frombuffer(context_lens, dtype=torch.int32),
        _matrix([table[: num_blocks_for(span.context_len)] for span, table in members]),
    )


def _matrix(tables: Sequence[Sequence[int]]) -> Tensor:
    """(num_sequences, longest) int32, filled up with zeros."""
    width = max(map(len, tables))
    flat = array("i")
    for table in tables:
        flat.extend(table)
        flat.extend([0] * (width - len(table)))
    return torch.frombuffer(flat, dtype=torch.int32).view(len(tables), width)
