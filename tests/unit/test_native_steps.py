"""Batches cut into the native kernels' steps. Needs no kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.batch import ALL_COMPONENTS, Batch, SequenceSpan
from models.llama.native_cache import NativeKVCache
from models.llama.native_steps import fresh_tables, given_tables, steps_of
from tests.support.fake_model import fake_config

BLOCK = 16


@st.composite
def batches(draw):
    """Sequences with some context, their blocks drawn from a shuffled cache, and the most rows of a step."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=6))
    blocks = draw(st.permutations(range(100)))
    spans, positions, start = [], [], 0
    for num_tokens, computed in lengths:
        context_len = computed + num_tokens
        table = [blocks.pop() for _ in range(-(-context_len // BLOCK) + draw(st.integers(0, 2)))]
        spans.append(
            SequenceSpan(start, num_tokens, context_len, None, table, draw(st.sampled_from([None, None, 0, 7])))
        )
        positions += range(computed, context_len)
        start += num_tokens
    batch = Batch(torch.arange(1000, 1000 + start), torch.tensor(positions), tuple(spans))
    return batch, draw(st.integers(1, 70))


def rank_of(span: SequenceSpan) -> int:
    return ALL_COMPONENTS if span.rank is None else span.rank


@settings(deadline=None, max_examples=150)
@given(batches())
def test_steps_hold_every_row_once_in_order_with_its_sequences_blocks(case) -> None:
    batch, max_rows = case
    cache = NativeKVCache(fake_config(), 100)
    tables = given_tables(batch.spans, cache)
    owner = {
        row: index for index, span in enumerate(batch.spans) for row in range(span.start, span.start + span.num_tokens)
    }
    row = 0
    for step in steps_of(batch.token_ids.tolist(), batch.spans, tables, max_rows):
        starts, num_rows = step.starts.tolist(), len(step.token_ids)
        assert 0 < num_rows <= max_rows
        assert (starts[0], starts[-1]) == (0, num_rows)
        assert len(starts) == len(step.context_lens) + 1
        assert len(step.block_tables) == len(step.context_lens) * step.table_stride
        assert all(numbers.itemsize == 4 for numbers in step[:5])
        for index, context_len in enumerate(step.context_lens.tolist()):
            rows = range(row + starts[index], row + starts[index + 1])
            assert len(rows) > 0
            assert len({owner[item] for item in rows}) == 1  # and next_sequence differs
            span = batch.spans[owner[rows[0]]]
            positions = step.positions.tolist()[starts[index] : starts[index + 1]]
            assert positions == list(range(context_len - len(rows), context_len))
            ranks = [ALL_COMPONENTS] * num_rows if step.ranks is None else step.ranks.tolist()
            assert ranks[starts[index] : starts[index + 1]] == [rank_of(span)] * len(rows)
            blocks = step.block_tables.tolist()[index * step.table_stride :][: -(-context_len // BLOCK)]
            assert blocks == list(span.block_table)[: len(blocks)]
        assert step.token_ids.tolist() == batch.token_ids[row : row + num_rows].tolist()
        row += num_rows
    assert row == batch.num_tokens


@settings(deadline=None, max_examples=50)
@given(batches())
def test_no_more_steps_than_rows_ask_for(case) -> None:
    batch, max_rows = case
    tables = given_tables(batch.spans, NativeKVCache(fake_config(), 100))
    steps = list(steps_of(batch.token_ids.tolist(), batch.spans, tables, max_rows))
    assert len(steps) == -(-batch.num_tokens // max_rows)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_fresh_tables_give_every_sequence_blocks_of_its_own(lengths: list[int]) -> None:
    batch = Batch.uncached([list(range(length)) for length in lengths])
    tables = fresh_tables(batch.spans)
    assert [len(table) for table in tables] == [-(-length // BLOCK) for length in lengths]
    assert [block for table in tables for block in table] == list(range(sum(map(len, tables))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_a_cache_takes_what_its_blocks_are_said_to_take(dtype: torch.dtype) -> None:
    cache = NativeKVCache(fake_config(), 7, dtype)
    assert cache.nbytes == 7 * NativeKVCache.bytes_per_block(fake_config(), dtype)
    assert cache.num_slots == 7 * BLOCK
    layer = cache.layer(0)
    assert layer.keys.shape == (7, 1, 1, 16)
    assert layer.values.shape == (7, 1, 16, 1)
    assert (layer.key_scale is None) == (layer.value_scale is None) == (dtype == torch.float16)
