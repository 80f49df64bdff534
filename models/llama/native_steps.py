"""From a batch to the native kernels' steps: rows in portions of bounded size, block tables as one matrix."""

from array import array
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ..kernels.native.program import StepInputs
from ..kernels.native.structs import CACHE_BLOCK
from .batch import SequenceSpan, ranks_of_rows
from .native_cache import NativeKVCache

_Member: TypeAlias = tuple[SequenceSpan, Sequence[int]]
"""One sequence's share of a step, and its block table."""


def num_blocks_for(num_tokens: int) -> int:
    """Cache blocks that ``num_tokens`` tokens take."""
    return -(-num_tokens // CACHE_BLOCK)


def given_tables(spans: Sequence[SequenceSpan], cache: NativeKVCache) -> list[Sequence[int]]:
    """The spans' own block tables.

    Raises:
        ValueError: a span without one, or one that is too short or leads out of the cache.
    """
    tables = [_given_table(span) for span in spans]
    if min(map(min, tables), default=0) < 0 or max(map(max, tables), default=0) >= cache.num_blocks:
        raise ValueError(f"a block table leads out of a cache of {cache.num_blocks} blocks")
    return tables


def _given_table(span: SequenceSpan) -> Sequence[int]:
    if span.block_table is None:
        raise ValueError("a batch that runs with the native key-value cache needs a block table in every span")
    table = span.block_table[: num_blocks_for(span.context_len)]
    if len(table) < num_blocks_for(span.context_len):
        raise ValueError(f"{len(table)} cache blocks do not hold {span.context_len} tokens")
    return table


def fresh_tables(spans: Sequence[SequenceSpan]) -> list[Sequence[int]]:
    """Block tables for whole sequences, one behind the other.

    Raises:
        ValueError: a span with earlier context, which only a cache could hold.
    """
    tables: list[Sequence[int]] = []
    start = 0
    for span in spans:
        if span.context_len > span.num_tokens:
            raise ValueError("a span with earlier context needs the key-value cache that holds it")
        end = start + num_blocks_for(span.num_tokens)
        tables.append(range(start, end))
        start = end
    return tables


def steps_of(
    token_ids: Sequence[int], spans: Sequence[SequenceSpan], tables: Sequence[Sequence[int]], max_rows: int
) -> Iterator[StepInputs]:
    """A batch in steps of at most ``max_rows`` rows, in row order; what a row gives does not depend on the cut."""
    numbers = array("i", token_ids)
    members = list(zip(spans, tables, strict=True))
    if len(numbers) > max_rows:
        for portion in _portions(members, max_rows):
            yield _step(numbers, portion)
    elif members:
        yield _step(numbers, members)


def _portions(members: Sequence[_Member], max_rows: int) -> Iterator[list[_Member]]:
    """``members`` cut into lots of at most ``max_rows`` rows."""
    portion: list[_Member] = []
    num_rows = 0
    for span, table in members:
        for piece in _pieces(span, num_rows, max_rows):
            if num_rows + piece.num_tokens > max_rows:
                yield portion
                portion, num_rows = [], 0
            portion.append((piece, table))
            num_rows += piece.num_tokens
    yield portion


def _pieces(span: SequenceSpan, num_rows: int, max_rows: int) -> Iterator[SequenceSpan]:
    """``span`` cut where a step is full: at what is left of the present one, then at whole steps."""
    done = 0
    room = max_rows - num_rows or max_rows
    while done < span.num_tokens:
        num_tokens = min(room, span.num_tokens - done)
        context_len = span.context_len - span.num_tokens + done + num_tokens
        yield SequenceSpan(span.start + done, num_tokens, context_len, rank=span.rank)
        done += num_tokens
        room = max_rows


def _step(token_ids: "array[int]", members: Sequence[_Member]) -> StepInputs:
    """The step of ``members``, whose rows of the batch's ``token_ids`` follow on each other."""
    first, last = members[0][0], members[-1][0]
    positions, starts, context_lens = array("i"), array("i"), array("i")
    rows: list[Sequence[int]] = []
    for span, table in members:
        starts.append(span.start - first.start)
        context_lens.append(span.context_len)
        positions.extend(range(span.context_len - span.num_tokens, span.context_len))
        rows.append(table[: num_blocks_for(span.context_len)])
    end = last.start + last.num_tokens
    starts.append(end - first.start)
    stride = max(map(len, rows))
    tokens, table = token_ids[first.start : end], _matrix(rows, stride)
    ranks = ranks_of_rows([span for span, _ in members])
    return StepInputs(tokens, positions, starts, context_lens, table, stride, ranks)


def _matrix(tables: Sequence[Sequence[int]], width: int) -> "array[int]":
    """``tables`` row by row, each filled up with zeros to ``width``."""
    flat = array("i")
    for table in tables:
        flat.extend(table)
        flat.extend([0] * (width - len(table)))
    return flat
