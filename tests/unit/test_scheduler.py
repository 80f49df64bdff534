"""Who runs in a step, and how much of each: order, budget, chunks, seats, blocks."""

import pytest

from service.engine.request import FinishReason
from tests.support.scheduling import add_prompts, compute, make_request, make_scheduler, plan_of, plans_of, run_step


def test_a_new_request_runs_its_whole_prompt_and_then_one_token_per_step():
    scheduler = make_scheduler()
    add_prompts(scheduler, a=5)
    assert plans_of(scheduler, 3) == [[("a", 5)], [("a", 1)], [("a", 1)]]


def test_running_requests_decode_in_the_step_in_which_another_starts():
    scheduler = make_scheduler()
    add_prompts(scheduler, a=4)
    run_step(scheduler)
    add_prompts(scheduler, b=7)
    assert plan_of(scheduler.schedule()) == [("a", 1), ("b", 7)]


def test_a_long_prompt_runs_in_chunks_that_end_at_block_boundaries_beside_the_decodes():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add_prompts(scheduler, a=4)
    run_step(scheduler)
    add_prompts(scheduler, long=19)
    assert plans_of(scheduler, 4) == [
        [("a", 1), ("long", 8)],
        [("a", 1), ("long", 8)],
        [("a", 1), ("long", 3)],
        [("a", 1), ("long", 1)],
    ]


def test_only_the_last_chunk_of_a_prompt_gets_a_token():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add_prompts(scheduler, a=17)
    gets = []
    for _ in range(4):
        (item,) = step = scheduler.schedule()
        gets.append((item.num_tokens, item.gets_token))
        compute(scheduler, step)
    assert gets == [(8, False), (8, False), (1, True), (1, True)]


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next_ones():
    scheduler = make_scheduler(max_num_batched_tokens=12)
    add_prompts(scheduler, a=6, b=9, c=1)
    assert plans_of(scheduler, 2) == [[("a", 6), ("b", 4)], [("a", 1), ("b", 5), ("c", 1)]]


def test_nobody_overtakes_a_prompt_that_not_one_block_fits_of():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add_prompts(scheduler, a=6, b=5, c=1)
    assert plans_of(scheduler, 2) == [[("a", 6)], [("a", 1), ("b", 5), ("c", 1)]]


def test_decodes_that_fill_the_budget_go_on_and_prompts_wait_for_one_to_end():
    scheduler = make_scheduler(max_num_seqs=6, max_num_batched_tokens=4)
    add_prompts(scheduler, a=1, b=1, c=1, d=1, late=2)
    decodes = [(name, 1) for name in "abcd"]
    assert plans_of(scheduler, 2) == [decodes, decodes]
    for request in scheduler.running[:2]:
        scheduler.finish(request, FinishReason.STOP)
    assert plan_of(scheduler.schedule()) == [("c", 1), ("d", 1), ("late", 2)]


def test_a_budget_smaller_than_a_block_is_refused():
    with pytest.raises(ValueError, match="3 is less than a block of 4 tokens"):
        make_scheduler(block_size=4, max_num_batched_tokens=3)


def test_a_request_that_needs_more_blocks_than_are_free_waits_and_is_not_overtaken():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    first, big, small = make_request("first", 4, 4), make_request("big", 12, 4), make_request("small", 1, 1)
    for request in (first, big, small):
        scheduler.add(request)
    run_step(scheduler)
    assert [request.request_id for request in scheduler.running] == ["first"]
    scheduler.finish(first, FinishReason.STOP)
    assert plan_of(scheduler.schedule()) == [("big", 12)]
    scheduler.finish(big, FinishReason.STOP)
    assert plan_of(scheduler.schedule()) == [("small", 1)]


def test_a_prompt_starts_with_blocks_for_all_of_it_and_then_takes_one_at_a_time():
    scheduler = make_scheduler(block_size=4, max_num_batched_tokens=4)
    request = make_request("a", num_prompt_tokens=7, max_tokens=6)
    scheduler.add(request)
    numbers = []
    for _ in range(7):
        run_step(scheduler)
        numbers.append((request.num_computed_tokens, scheduler.blocks.num_used_blocks))
    assert numbers == [(4, 2), (7, 2), (8, 2), (9, 3), (10, 3), (11, 3), (12, 3)]


def test_seats_are_limited():
    scheduler = make_scheduler(max_num_seqs=2)
    add_prompts(scheduler, a=4, b=4, c=4)
    assert [name for name, _ in plan_of(scheduler.schedule())] == ["a", "b"]
    assert [request.request_id for request in scheduler.waiting] == ["c"]


def test_finishing_frees_the_blocks_of_running_of_half_computed_and_of_waiting_requests_once():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=8)
    running, partial, waiting = (make_request(name, 6) for name in "abc")
    for request in (running, partial, waiting):
        scheduler.add(request)
    run_step(scheduler)
    assert plan_of(scheduler.schedule()) == [("a", 1), ("b", 6)]
    scheduler.finish(running, FinishReason.ABORT)
    for request in (waiting, partial, running, running):
        scheduler.finish(request, FinishReason.ABORT)
    assert not scheduler.has_work
    assert scheduler.blocks.num_used_blocks == 0
    assert running.finish_reason is FinishReason.ABORT


def test_a_prompt_aborted_between_two_chunks_makes_room_for_the_next():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=4)
    long, after = make_request("long", 9, 4), make_request("after", 3, 4)
    scheduler.add(long)
    scheduler.add(after)
    run_step(scheduler)
    assert not long.is_prompt_computed
    scheduler.finish(long, FinishReason.ABORT)
    assert plan_of(scheduler.schedule()) == [("after", 3)]
    assert scheduler.blocks.num_used_blocks == len(after.block_table)


@pytest.mark.parametrize(("length", "message"), [(8, "may take 12 tokens, the cache holds 8"), (0, "has no prompt")])
def test_a_request_that_could_never_run_is_refused_at_once(length, message):
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_request("a", length, 4))
    assert not scheduler.has_work
