"""Who runs in a step: order, budget, seats, reservations."""

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


def compute(step):
    """What the engine does with a step: every scheduled token is computed and one more is known."""
    for item in step:
        item.request.num_computed_tokens += item.num_tokens
        item.request.output_token_ids.append(0)


def plan_of(step):
    return [(item.request.request_id, item.num_tokens) for item in step]


def test_a_new_request_runs_its_whole_prompt_and_then_one_token_per_step():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", num_prompt_tokens=5))
    plans = []
    for _ in range(3):
        step = scheduler.schedule()
        plans.append(plan_of(step))
        compute(step)
    assert plans == [[("a", 5)], [("a", 1)], [("a", 1)]]


def test_running_requests_decode_in_the_step_in_which_another_starts():
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    compute(scheduler.schedule())
    scheduler.add(make_request("b", num_prompt_tokens=7))
    assert plan_of(scheduler.schedule()) == [("a", 1), ("b", 7)]


def test_the_token_budget_holds_back_later_prompts():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    for name, length in (("a", 6), ("b", 5), ("c", 1)):
        scheduler.add(make_request(name, num_prompt_tokens=length))
    first = scheduler.schedule()
    compute(first)
    assert plan_of(first) == [("a", 6)]  # b does not fit, and c may not overtake it
    assert plan_of(scheduler.schedule()) == [("a", 1), ("b", 5), ("c", 1)]


def test_a_prompt_longer_than_the_budget_still_runs():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_request("long", num_prompt_tokens=50))
    scheduler.add(make_request("short", num_prompt_tokens=1))
    assert plan_of(scheduler.schedule()) == [("long", 50)]


def test_a_request_that_needs_more_blocks_than_are_free_waits_and_is_not_overtaken():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    first, big, small = make_request("first", 4, 4), make_request("big", 8, 4), make_request("small", 1, 1)
    for request in (first, big, small):
        scheduler.add(request)
    compute(scheduler.schedule())
    assert [request.request_id for request in scheduler.running] == ["first"]
    scheduler.finish(first, FinishReason.STOP)
    assert plan_of(scheduler.schedule()) == [("big", 8), ("small", 1)]


def test_blocks_are_reserved_to_the_last_possible_token():
    scheduler = make_scheduler(block_size=4)
    request = make_request("a", num_prompt_tokens=5, max_tokens=6)
    scheduler.add(request)
    scheduler.schedule()
    assert len(request.block_table) * 4 >= 11
    assert scheduler.blocks.num_used_blocks == 3


def test_seats_are_limited():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name))
    assert [name for name, _ in plan_of(scheduler.schedule())] == ["a", "b"]
    assert [request.request_id for request in scheduler.waiting] == ["c"]


def test_finishing_frees_the_blocks_of_running_and_of_waiting_requests_once():
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request("a"), make_request("b")
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    for request in (waiting, running, running):
        scheduler.finish(request, FinishReason.ABORT)
    assert not scheduler.has_work
    assert scheduler.blocks.num_used_blocks == 0
    assert running.finish_reason is FinishReason.ABORT


def test_a_request_that_could_never_run_is_refused_at_once():
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="reserves 12 tokens, the cache holds 8"):
        scheduler.add(make_request("a", 8, 4))
    assert not scheduler.has_work


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10), st.integers(0, 5)), min_size=1, max_size=25),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_every_request_finishes_in_order_of_arrival_and_all_blocks_come_back(arrivals, max_num_seqs, budget):
    scheduler = make_scheduler(num_blocks=20, block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    pending = [(make_request(str(i), prompt, out), gap) for i, (prompt, out, gap) in enumerate(arrivals)]
    started = []
    steps = 0
    while pending or scheduler.has_work:
        steps += 1
        assert steps < 2000
        if pending and steps % (1 + pending[0][1]) == 0:
            scheduler.add(pending.pop(0)[0])
        step = scheduler.schedule()
        assert len(step) == len(scheduler.running) <= max_num_seqs
        assert all(item.num_tokens >= 1 for item in step)
        prompts = [item for item in step if item.request.num_output_tokens == 0]
        assert sum(item.num_tokens for item in step) <= budget + max_num_seqs or len(prompts) == 1
        assert scheduler.blocks.num_used_blocks == sum(len(request.block_table) for request in scheduler.running)
        started += [item.request for item in prompts]
        compute(step)
        for item in step:
            assert item.request.num_tokens <= item.request.num_reserved_tokens
            if item.request.num_output_tokens == item.request.params.max_tokens:
                scheduler.finish(item.request, FinishReason.LENGTH)
    assert [request.request_id for request in started] == [str(index) for index in range(len(arrivals))]
    assert scheduler.blocks.num_used_blocks == 0
