"""Blocks that run out, and blocks that are there already: preemption and shared prefixes."""

import pytest

from service.engine.request import FinishReason, Request, SamplingParams
from tests.support.scheduling import make_request, make_scheduler, plans_of, request_of, run_step

TEXT = range(20)


def decode_until_preempted(scheduler):
    for _ in range(100):
        run_step(scheduler)
        if scheduler.preempted:
            return [request.request_id for request in scheduler.preempted]
    raise AssertionError("nobody was preempted")


def test_when_blocks_run_out_the_latest_gives_way_and_is_first_in_the_queue():
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    requests = [make_request(name, 4, 12) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler)
    late = make_request("late", 8)
    scheduler.add(late)
    assert decode_until_preempted(scheduler) == ["b"]
    assert list(scheduler.waiting) == [requests[1], late]
    assert [request.request_id for request in scheduler.running] == ["a"]
    assert requests[1].block_table == [] and requests[1].num_computed_tokens == 0
    assert requests[1].num_output_tokens == 5  # 4 + 5 tokens each would take 3 blocks each, and there are 5


def test_a_preempted_request_is_computed_again_from_where_the_cache_has_forgotten_it():
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    first, second = make_request("first", 4, 12), make_request("second", 4, 12)
    scheduler.add(first)
    scheduler.add(second)
    assert decode_until_preempted(scheduler) == ["second"]
    scheduler.finish(first, FinishReason.STOP)
    assert run_step(scheduler) == [("second", 1)]  # of its 9 tokens 8 were computed, in 2 blocks
    assert second.num_output_tokens == 6
    assert second.num_cached_tokens == 0  # it had none when it came


def test_the_end_of_a_preempted_request_is_forgotten_first():
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    first, second = make_request("first", 4, 12), make_request("second", 4, 12)
    scheduler.add(first)
    scheduler.add(second)
    decode_until_preempted(scheduler)
    while len(first.block_table) < 4:
        assert run_step(scheduler) == [("first", 1)]
    scheduler.finish(first, FinishReason.STOP)
    assert run_step(scheduler) == [("second", 5)]


def test_without_a_prefix_cache_a_preempted_request_is_computed_from_its_start():
    scheduler = make_scheduler(num_blocks=5, block_size=4, has_prefix_cache=False)
    first, second = make_request("first", 4, 12), make_request("second", 4, 12)
    scheduler.add(first)
    scheduler.add(second)
    assert decode_until_preempted(scheduler) == ["second"]
    scheduler.finish(first, FinishReason.STOP)
    assert run_step(scheduler) == [("second", 9)]


def test_a_preempted_request_is_computed_again_in_chunks_and_gets_its_token_after_the_last():
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_num_batched_tokens=8, has_prefix_cache=False)
    first, second = make_request("first", 4, 12), make_request("second", 4, 12)
    scheduler.add(first)
    scheduler.add(second)
    decode_until_preempted(scheduler)
    scheduler.finish(first, FinishReason.STOP)
    seen = [(run_step(scheduler), second.num_output_tokens) for _ in range(3)]
    assert seen == [([("second", 8)], 5), ([("second", 1)], 6), ([("second", 1)], 7)]


def test_preempted_requests_come_back_in_the_order_in_which_they_came_first():
    scheduler = make_scheduler(num_blocks=9, block_size=4)
    requests = [make_request(name, 4, 24) for name in "abcd"]
    for request in requests:
        scheduler.add(request)
    gone = []
    while len(gone) < 2:
        gone += decode_until_preempted(scheduler)
    assert gone == ["d", "c"]
    assert [request.request_id for request in scheduler.waiting] == ["c", "d"]


def test_a_prompt_that_is_being_computed_gives_way_as_well():
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_num_batched_tokens=5)
    first = make_request("first", 4, 28)
    scheduler.add(first)
    run_step(scheduler)
    long = make_request("long", 20)
    scheduler.add(long)
    run_step(scheduler)
    assert long.num_computed_tokens == 4
    run_step(scheduler)
    scheduler.max_num_batched_tokens = 4  # not one block of it fits beside the decode any more
    assert decode_until_preempted(scheduler) == ["long"]
    assert list(scheduler.waiting) == [long]


def test_a_prompt_does_not_start_when_those_that_run_could_soon_need_its_blocks():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    first = make_request("first", 4, 8)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(make_request("next", 12))  # 3 blocks, and 3 are free, but the first one is about to need another
    assert run_step(scheduler) == [("first", 1)]
    scheduler.finish(first, FinishReason.STOP)
    assert run_step(scheduler) == [("next", 12)]


def test_a_prompt_that_fills_the_whole_cache_starts_when_nobody_else_runs():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_request("all", 15, 1))
    assert run_step(scheduler) == [("all", 15)]


def test_a_prompt_that_begins_like_an_earlier_one_starts_behind_its_blocks():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(request_of("a", TEXT[:10]))
    run_step(scheduler)
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    again, longer = request_of("again", TEXT[:10]), request_of("longer", [*TEXT[:10], "x", "y", "z"])
    for request in (again, longer):
        scheduler.add(request)
    assert run_step(scheduler) == [("again", 2), ("longer", 5)]
    assert (again.num_cached_tokens, longer.num_cached_tokens) == (8, 8)
    assert again.block_table[:2] == longer.block_table[:2]


def test_of_a_prompt_that_is_known_as_a_whole_the_last_block_is_computed():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(request_of("a", TEXT[:8]))
    run_step(scheduler)
    scheduler.add(request_of("same", TEXT[:8]))
    assert run_step(scheduler) == [("a", 1), ("same", 4)]


def test_what_was_generated_is_found_by_a_prompt_that_repeats_it():
    scheduler = make_scheduler(block_size=4)
    first = request_of("a", TEXT[:6], max_tokens=9)
    scheduler.add(first)
    for _ in range(6):
        run_step(scheduler)
    turn = Request("turn", [*first.prompt_token_ids, *first.output_token_ids, 5, 6], SamplingParams(max_tokens=2))
    scheduler.add(turn)
    run_step(scheduler)
    assert turn.num_cached_tokens == 8  # 6 + 5 are computed; the third block is not full


@pytest.mark.parametrize("what", ["salt", "off"])
def test_nothing_is_shared_across_salts_or_when_it_is_switched_off(what):
    scheduler = make_scheduler(block_size=4, has_prefix_cache=what != "off")
    first, second = request_of("a", TEXT[:10]), request_of("b", TEXT[:10])
    if what == "salt":
        second.cache_salt = "another key"
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [("a", 10), ("b", 10)]
    assert not set(first.block_table) & set(second.block_table)
    scheduler.finish(first, FinishReason.STOP)
    scheduler.finish(second, FinishReason.STOP)
    assert scheduler.blocks.num_cached_blocks == (0 if what == "off" else 4)


def test_prompts_that_begin_alike_wait_a_step_for_the_first_of_them():
    scheduler = make_scheduler(block_size=4)
    for name in "abc":
        scheduler.add(request_of(name, [*TEXT[:8], name]))
    scheduler.add(make_request("other", 3))
    assert plans_of(scheduler, 2) == [[("a", 9)], [("a", 1), ("b", 1), ("c", 1), ("other", 3)]]


def test_prompts_without_a_full_block_in_common_do_not_wait():
    scheduler = make_scheduler(block_size=4)
    for name in "ab":
        scheduler.add(request_of(name, [*TEXT[:3], name, 7]))
    assert run_step(scheduler) == [("a", 5), ("b", 5)]


def test_prompts_go_on_by_themselves_when_the_one_they_waited_for_failed():
    scheduler = make_scheduler(block_size=4)
    for name in "ab":
        scheduler.add(request_of(name, [*TEXT[:8], name]))
    (item,) = scheduler.schedule()
    scheduler.finish(item.request, FinishReason.ERROR)
    assert run_step(scheduler) == [("b", 9)]


def test_what_a_failed_request_has_computed_is_not_found_and_what_an_aborted_one_has_is():
    for reason, num_cached in ((FinishReason.ERROR, 0), (FinishReason.ABORT, 8)):
        scheduler = make_scheduler(block_size=4)
        scheduler.add(request_of("a", TEXT[:10]))
        run_step(scheduler)
        scheduler.finish(scheduler.running[0], reason)
        again = request_of("again", TEXT[:10])
        scheduler.add(again)
        run_step(scheduler)
        assert again.num_cached_tokens == num_cached


def test_a_scored_prompt_takes_nothing_from_the_cache_that_a_scored_token_follows_on():
    scheduler = make_scheduler(block_size=4)
    scheduler.add(request_of("a", TEXT))
    run_step(scheduler)
    scored = request_of("scored", TEXT, max_tokens=0)
    scored.params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
    scored.score_from = 10
    scheduler.add(scored)
    assert run_step(scheduler) == [("a", 1), ("scored", 12)]
