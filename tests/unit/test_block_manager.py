"""Cache blocks: who holds them, by which keys they are found, and in which order they go."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.block_keys import block_key, keys_of, root_key
from service.engine.block_manager import BlockManager
from service.engine.request import Request, SamplingParams


def published(blocks, *keys):
    """A table of computed blocks that are found by ``keys``."""
    table = blocks.allocate(len(keys))
    return [blocks.publish(block, key) for block, key in zip(table, keys, strict=True)]


def test_blocks_for_tokens_are_rounded_up():
    blocks = BlockManager(num_blocks=10, block_size=16)
    assert [blocks.num_blocks_for(num_tokens) for num_tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_what_does_not_fit_is_refused_and_takes_nothing():
    blocks = BlockManager(num_blocks=2)
    assert not blocks.can_allocate(3)
    with pytest.raises(ValueError, match="3 cache blocks are asked for, 2 are free"):
        blocks.allocate(3)
    assert blocks.num_free_blocks == 2


def test_a_block_cannot_be_freed_more_often_than_it_is_held():
    blocks = BlockManager(num_blocks=4)
    table = blocks.allocate(2)
    blocks.hold([])
    blocks.free(table)
    with pytest.raises(ValueError, match="not in use"):
        blocks.free(table)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="cannot hold anything"):
        BlockManager(num_blocks=0)


def test_a_prefix_is_found_as_far_as_it_goes_while_held_and_after():
    blocks = BlockManager(num_blocks=8)
    table = published(blocks, b"a", b"b", b"c")
    for _ in range(2):
        assert blocks.find([b"a", b"b", b"x", b"c"]) == table[:2]
        assert blocks.find([b"b"]) == table[1:2]
        if blocks.num_used_blocks:
            blocks.free(table)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks, blocks.num_free_blocks) == (0, 3, 8)


def test_held_twice_a_block_is_used_once_and_free_after_both():
    blocks = BlockManager(num_blocks=4)
    table = published(blocks, b"a", b"b")
    blocks.hold(blocks.find([b"a"]))
    assert blocks.num_used_blocks == 2
    blocks.free(table)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks, blocks.usage) == (1, 1, 0.25)
    blocks.free(table[:1])
    assert blocks.num_cached_blocks == 2


def test_blocks_that_would_be_held_again_are_not_there_to_be_allocated():
    blocks = BlockManager(num_blocks=4)
    blocks.free(published(blocks, b"a", b"b"))
    found = blocks.find([b"a", b"b"])
    assert blocks.can_allocate(4)
    assert blocks.can_allocate(2, found)
    assert not blocks.can_allocate(3, found)
    blocks.hold(found)
    assert blocks.can_allocate(2, found)  # they are held: no longer free in any case


def test_blocks_without_a_key_go_first_then_the_least_recently_released_and_ends_before_beginnings():
    blocks = BlockManager(num_blocks=6)
    first, second = published(blocks, b"a", b"b"), published(blocks, b"c", b"d")
    blocks.free(second)
    blocks.free(first)
    blocks.hold(blocks.find([b"c"]))  # used again, and so the most recently released
    blocks.free(second[:1])
    order = []
    for _ in range(6):
        blocks.allocate(1)
        order.append([key for key in (b"a", b"b", b"c", b"d") if blocks.find([key])])
    assert order == [[*b_keys] for b_keys in _keys("abcd", "abcd", "abc", "ac", "c", "")]


def _keys(*names):
    return [[letter.encode() for letter in name] for name in names]


def test_a_second_block_with_the_same_key_is_given_up_for_the_first():
    blocks = BlockManager(num_blocks=4)
    first, second = published(blocks, b"a"), published(blocks, b"a")
    assert first == second
    assert blocks.num_used_blocks == 1
    assert blocks.publish(first[0], b"a") == first[0]
    blocks.free(first)
    assert blocks.num_used_blocks == 1
    blocks.free(second)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (0, 1)


def test_forgotten_blocks_are_not_found_and_come_back_as_blocks_without_a_key():
    blocks = BlockManager(num_blocks=4)
    table = published(blocks, b"a", b"b")
    blocks.forget(table)
    assert blocks.find([b"a"]) == []
    blocks.free(table)
    assert (blocks.num_cached_blocks, blocks.num_free_blocks) == (0, 4)
    assert blocks.find(published(blocks, b"a")) == []


def key_list(tokens, salt="", num_blocks=None, block_size=4, **fields):
    request = Request("r", list(tokens), SamplingParams(max_tokens=9), cache_salt=salt, **fields)
    return keys_of(request, len(tokens) // block_size if num_blocks is None else num_blocks, block_size)


def test_keys_agree_exactly_as_far_as_the_tokens_do():
    one, other = key_list(range(16)), key_list([*range(8), 99, *range(9, 16)])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False]
    assert len(set(one + other)) == 6
    assert {len(key) for key in one} == {32}


def test_a_block_has_another_key_after_other_tokens_and_under_another_salt():
    assert key_list([1, 2, 3, 4] * 2)[0] != key_list([1, 2, 3, 4] * 2)[1]
    assert not set(key_list(range(8), "one")) & set(key_list(range(8), "two"))
    assert root_key("") != root_key("\ud800")


def test_where_one_tokens_bytes_end_and_the_next_ones_begin_matters():
    assert block_key(b"", [1, 256]) != block_key(b"", [256, 1])
    assert block_key(b"", [258]) != block_key(b"", [2, 1])


def test_keys_go_on_into_the_output_and_are_worked_out_once():
    whole = key_list(range(12))
    request = Request("r", list(range(6)), SamplingParams(max_tokens=9))
    assert keys_of(request, 1, 4) == whole[:1]
    request.output_token_ids += range(6, 12)
    first = request.block_keys[0]
    assert keys_of(request, 3, 4) == whole
    assert request.block_keys[0] is first


class Blocks(RuleBasedStateMachine):
    """Tables over a small alphabet of chains, beside a model of it: who holds what, and which text is in it."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(num_blocks=9, block_size=1)
        self.tables = []  # [blocks, texts]: a text is all tokens up to the end of its block, None until published
        self.content = {}  # block -> the text that was published in it last

    @rule(text=st.text("ab", min_size=1, max_size=5), num_more=st.integers(0, 2))
    def start(self, text, num_more):
        keys = [text[: end + 1].encode() for end in range(len(text))]
        found = self.blocks.find(keys)
        assert all(self.content[block] == key.decode() for block, key in zip(found, keys[: len(found)], strict=True))
        wanted = len(text) - len(found) + num_more
        if self.blocks.can_allocate(wanted, found):
            self.blocks.hold(found)
            table = found + self.blocks.allocate(wanted)
            fresh = table[len(found) :]
            assert not set(fresh) & {block for other, _ in self.tables for block in other}
            for block in fresh:
                self.content.pop(block, None)
            self.tables.append((table, text))
            for index in range(len(found), len(text)):
                table[index] = self.blocks.publish(table[index], keys[index])
                self.content[table[index]] = text[: index + 1]
        else:
            assert wanted > 9 - len({block for other, _ in self.tables for block in other} | set(found))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.free(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fail(self, data):
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.forget(table)
        self.blocks.free(table)
        for block in table:
            assert all(block not in self.blocks.find([text.encode()]) for text in self.content.values())

    @invariant()
    def every_block_is_held_by_the_tables_with_it_and_no_others(self):
        held = [block for table, _ in self.tables for block in table]
        assert self.blocks._num_holders == [held.count(block) for block in range(9)]
        assert self.blocks.num_used_blocks == len(set(held))
        assert self.blocks.num_used_blocks + self.blocks.num_free_blocks == 9
        assert sorted([*self.blocks._free, *self.blocks._kept, *set(held)]) == list(range(9))

    @invariant()
    def what_several_hold_is_the_same_text(self):
        for table, text in self.tables:
            assert len(set(table)) == len(table)
            assert [self.content[block] for block in table[: len(text)]] == [text[: n + 1] for n in range(len(text))]

    @invariant()
    def no_block_that_can_be_evicted_leaves_its_continuation_behind(self):
        order = [self.content[block] for block in self.blocks._kept]
        for index, text in enumerate(order):
            assert not any(later.startswith(text) for later in order[index + 1 :])


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
