"""The free list of cache blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.block_manager import BlockManager


def test_a_table_has_one_block_per_started_group_of_tokens():
    blocks = BlockManager(num_blocks=10, block_size=16)
    assert [len(blocks.allocate(num_tokens)) for num_tokens in (1, 16, 17)] == [1, 1, 2]
    assert blocks.num_free_blocks == 6
    assert blocks.usage == pytest.approx(0.4)


def test_what_does_not_fit_is_refused_and_takes_nothing():
    blocks = BlockManager(num_blocks=2, block_size=16)
    assert not blocks.can_allocate(33)
    with pytest.raises(ValueError, match="3 cache blocks are asked for, 2 are free"):
        blocks.allocate(33)
    assert blocks.num_free_blocks == 2


def test_a_block_cannot_be_freed_twice():
    blocks = BlockManager(num_blocks=4)
    table = blocks.allocate(20)
    blocks.free(table)
    with pytest.raises(ValueError, match="not in use"):
        blocks.free(table)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="cannot hold anything"):
        BlockManager(num_blocks=0)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_no_block_is_ever_held_twice_and_all_come_back(steps):
    blocks = BlockManager(num_blocks=12, block_size=4)
    tables = []
    for is_allocation, number in steps:
        if is_allocation and blocks.can_allocate(number):
            tables.append(blocks.allocate(number))
        elif tables:
            blocks.free(tables.pop(number % len(tables)))
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held)) == blocks.num_used_blocks
        assert set(held) <= set(range(12))
        assert blocks.num_free_blocks + blocks.num_used_blocks == 12
    for table in tables:
        blocks.free(table)
    assert blocks.num_free_blocks == 12
