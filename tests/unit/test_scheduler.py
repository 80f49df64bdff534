"""Who runs in a step, and how much of each: order, budget, chunks, seats, reservations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.block_manager import BlockManager
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.scheduler import Scheduler


def make_request(name, num_prompt_tokens=4, max_tokens=4):
    return Request(name, list(range(num_prompt_tokens)), SamplingParams(max_tokens=max_tokens))


def make_scheduler(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=100):
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, max_num_batched_tokens)


def add(scheduler, **num_prompt_tokens):
    for name, length in num_prompt_tokens.items():
        scheduler.add(make_request(name, length))


def compute(step):
    """What the engine does with a step: every scheduled token is computed, and who has no more gets a token."""
    for request, num_tokens, _ in step:
        request.num_computed_tokens += num_tokens
        if request.num_computed_tokens == request.num_tokens:
            request.output_token_ids.append(0)


def plan_of(step):
    return [(item.request.request_id, item.num_tokens) for item in step]


def plans_of(scheduler, num_steps):
    plans = []
    for _ in range(num_steps):
        step = scheduler.schedule()
        plans.append(plan_of(step))
        compute(step)
    return plans


def test_a_new_request_runs_its_whole_prompt_and_then_one_token_per_step():
    scheduler = make_scheduler()
    add(scheduler, a=5)
    assert plans_of(scheduler, 3) == [[("a", 5)], [("a", 1)], [("a", 1)]]


def test_running_requests_decode_in_the_step_in_which_another_starts():
    scheduler = make_scheduler()
    add(scheduler, a=4)
    compute(scheduler.schedule())
    add(scheduler, b=7)
    assert plan_of(scheduler.schedule()) == [("a", 1), ("b", 7)]


def test_a_long_prompt_runs_in_chunks_that_end_at_block_boundaries_beside_the_decodes():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, a=4)
    compute(scheduler.schedule())
    add(scheduler, long=19)
    assert plans_of(scheduler, 4) == [
        [("a", 1), ("long", 8)],
        [("a", 1), ("long", 8)],
        [("a", 1), ("long", 3)],
        [("a", 1), ("long", 1)],
    ]


def test_only_the_last_chunk_of_a_prompt_gets_a_token():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, a=17)
    gets = []
    for _ in range(4):
        (item,) = step = scheduler.schedule()
        gets.append((item.num_tokens, item.gets_token))
        compute(step)
    assert gets == [(8, False), (8, False), (1, True), (1, True)]


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next_ones():
    scheduler = make_scheduler(max_num_batched_tokens=12)
    add(scheduler, a=6, b=9, c=1)
    assert plans_of(scheduler, 2) == [[("a", 6), ("b", 4)], [("a", 1), ("b", 5), ("c", 1)]]


def test_nobody_overtakes_a_prompt_that_not_one_block_fits_of():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, a=6, b=5, c=1)
    assert plans_of(scheduler, 2) == [[("a", 6)], [("a", 1), ("b", 5), ("c", 1)]]


def test_decodes_that_fill_the_budget_go_on_and_prompts_wait_for_one_to_end():
    scheduler = make_scheduler(max_num_seqs=6, max_num_batched_tokens=4)
    add(scheduler, a=1, b=1, c=1, d=1, late=2)
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
    first, big, small = make_request("first", 4, 4), make_request("big", 8, 4), make_request("small", 1, 1)
    for request in (first, big, small):
        scheduler.add(request)
    compute(scheduler.schedule())
    assert [request.request_id for request in scheduler.running] == ["first"]
    scheduler.finish(first, FinishReason.STOP)
    assert plan_of(scheduler.schedule()) == [("big", 8), ("small", 1)]


def test_blocks_are_reserved_to_the_last_possible_token_with_the_first_chunk():
    scheduler = make_scheduler(block_size=4, max_num_batched_tokens=4)
    request = make_request("a", num_prompt_tokens=5, max_tokens=6)
    scheduler.add(request)
    assert plan_of(scheduler.schedule()) == [("a", 4)]
    assert len(request.block_table) * 4 >= 11
    assert scheduler.blocks.num_used_blocks == 3


def test_seats_are_limited():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, a=4, b=4, c=4)
    assert [name for name, _ in plan_of(scheduler.schedule())] == ["a", "b"]
    assert [request.request_id for request in scheduler.waiting] == ["c"]


def test_finishing_frees_the_blocks_of_running_of_half_computed_and_of_waiting_requests_once():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=8)
    running, partial, waiting = (make_request(name, 6) for name in "abc")
    for request in (running, partial, waiting):
        scheduler.add(request)
    compute(scheduler.schedule())
    step = scheduler.schedule()
    assert plan_of(step) == [("a", 1), ("b", 6)]
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
    compute(scheduler.schedule())
    assert not long.is_prompt_computed
    scheduler.finish(long, FinishReason.ABORT)
    assert plan_of(scheduler.schedule()) == [("after", 3)]
    assert scheduler.blocks.num_used_blocks == len(after.block_table)


@pytest.mark.parametrize(("length", "message"), [(8, "reserves 12 tokens, the cache holds 8"), (0, "has no prompt")])
def test_a_request_that_could_never_run_is_refused_at_once(length, message):
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match=message):
        scheduler.add(make_request("a", length, 4))
    assert not scheduler.has_work


def check_step(scheduler, step):
    """What holds in every step, whatever arrives."""
    budget, block_size = scheduler.max_num_batched_tokens, scheduler.blocks.block_size
    decodes = [item for item in step if item.request.is_prompt_computed]
    prompts = [item for item in step if not item.request.is_prompt_computed]
    assert step == decodes + prompts
    assert [item.request for item in decodes] == [item for item in scheduler.running if item.is_prompt_computed]
    assert all(item.num_tokens == 1 and item.gets_token for item in decodes)
    assert sum(item.num_tokens for item in step) <= budget
    for request, num_tokens, gets_token in prompts:
        end = request.num_computed_tokens + num_tokens
        assert gets_token == (end == request.num_prompt_tokens)
        assert num_tokens >= 1 and (gets_token or end % block_size == 0)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert scheduler.blocks.num_used_blocks == sum(len(request.block_table) for request in scheduler.running)
    if len(decodes) + block_size <= budget and any(not request.is_prompt_computed for request in scheduler.running):
        assert prompts  # the oldest prompt goes on


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10), st.integers(0, 5)), min_size=1, max_size=25),
    st.integers(1, 8),
    st.integers(4, 40),
)
def test_every_prompt_is_completed_in_order_of_arrival_and_all_blocks_come_back(arrivals, max_num_seqs, budget):
    scheduler = make_scheduler(num_blocks=20, block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    pending = [(make_request(str(i), prompt, out), gap) for i, (prompt, out, gap) in enumerate(arrivals)]
    completed, steps = [], 0
    while pending or scheduler.has_work:
        steps += 1
        assert steps < 2000
        if pending and steps % (1 + pending[0][1]) == 0:
            scheduler.add(pending.pop(0)[0])
        step = scheduler.schedule()
        assert step or not scheduler.has_work
        check_step(scheduler, step)
        compute(step)
        completed += [item.request for item in step if item.request.num_output_tokens == 1 and item.gets_token]
        for item in step:
            assert item.request.num_tokens <= item.request.num_reserved_tokens
            if item.request.num_output_tokens == item.request.params.max_tokens:
                scheduler.finish(item.request, FinishReason.LENGTH)
    assert [request.request_id for request in completed] == [str(index) for index in range(len(arrivals))]
    assert all(request.num_output_tokens == request.params.max_tokens for request in completed)
    assert scheduler.blocks.num_used_blocks == 0
