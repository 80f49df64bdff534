"""Seats and queued tokens: never more than allowed, all given back whatever happens, and how long a newcomer waits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import Admission, QueueFullError
from service.engine.engine import RequestOutput
from service.engine.generation import DeadlineExceededError, Generation
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.throughput import MAX_RETRY_SECONDS, Throughput


class IdleEngine:
    """Takes requests and does nothing with them."""

    def __init__(self):
        self.running = set()

    def clock(self):
        return 1.0

    def add(self, generation, requests):
        self.running |= {request.request_id for request in requests}

    def abort(self, request_ids):
        self.running -= request_ids


def request(name, num_tokens):
    return Request(name, [1] * num_tokens, SamplingParams(max_tokens=4))


def drive(chance, engine, call, sizes):
    """One call through a random part of its life."""
    requests = [request(f"{id(call)}-{index}", size) for index, size in enumerate(sizes)]
    if chance.random() < 0.2:
        return  # refused while it was tokenized
    try:
        call.start(requests)
    except QueueFullError:
        return
    for item in requests:
        for step in range(1, chance.randint(0, 3)):
            call.deliver(RequestOutput(item.request_id, num_output_tokens=step))
        if chance.random() < 0.5:
            engine.running.discard(item.request_id)
            reason = chance.choice([FinishReason.STOP, FinishReason.ERROR])
            call.deliver(RequestOutput(item.request_id, num_output_tokens=3, finish_reason=reason))


@given(st.integers(0, 2**32))
def test_whatever_happens_to_calls_counts_stay_within_bounds_and_return_to_zero(seed):
    chance, engine = random.Random(seed), IdleEngine()
    capacity, most = chance.randint(1, 8), chance.choice([None, 1, 20, 60])
    admission = Admission(capacity, most, Throughput())
    live = []
    for _ in range(40):
        if live and chance.random() < 0.4:
            call = live.pop(chance.randrange(len(live)))
            for _ in range(chance.randint(1, 2)):
                call.close()
        sizes = [chance.randint(1, 30) for _ in range(chance.randint(1, 3))]
        try:
            reservation = admission.reserve(len(sizes), chance.randint(1, 40))
        except QueueFullError as error:
            assert error.retry_seconds >= 1
            assert live or len(sizes) > capacity
            continue
        live.append(Generation(engine, reservation))
        drive(chance, engine, live[-1], sizes)
        assert admission.num_sequences <= capacity
        # One call is let in however long it is, and only beside nothing else that waits.
        waiting = [call._reservation.num_tokens for call in live if call._reservation.num_tokens]
        assert sum(waiting) == admission.num_queued_tokens
        assert most is None or len(waiting) == 1 or admission.num_queued_tokens <= most
    for call in live:
        call.close()
    assert (admission.num_sequences, admission.num_queued_tokens, engine.running) == (0, 0, set())


def test_a_prompt_waits_until_its_first_token():
    admission = Admission(4, 100, Throughput())
    call = Generation(IdleEngine(), admission.reserve(2, 10))
    call.start([request("a", 30), request("b", 40)])
    assert admission.num_queued_tokens == 70
    with pytest.raises(QueueFullError):
        admission.reserve(1, 31)
    call.deliver(RequestOutput("a", num_output_tokens=1))
    assert (admission.num_queued_tokens, admission.num_sequences) == (40, 2)
    admission.reserve(1, 31).close()
    call.deliver(RequestOutput("b", finish_reason=FinishReason.ERROR))
    assert (admission.num_queued_tokens, admission.num_sequences) == (0, 1)
    call.close()


def test_a_prompt_that_is_longer_than_it_looked_is_refused_beside_others():
    admission = Admission(4, 100, Throughput())
    first, engine = Generation(IdleEngine(), admission.reserve(1, 60)), IdleEngine()
    second = Generation(engine, admission.reserve(1, 10))
    with pytest.raises(QueueFullError):
        second.start([request("b", 50)])
    assert engine.running == set()
    second.close()
    assert admission.num_queued_tokens == 60
    first.close()


def test_a_call_alone_is_let_in_however_long_it_is():
    admission = Admission(1, 5, Throughput())
    call = Generation(IdleEngine(), admission.reserve(1, 1000))
    call.start([request("a", 4000)])
    assert admission.num_queued_tokens == 4000
    call.close()


def test_a_call_that_keeps_its_seat_keeps_it_between_its_requests():
    admission = Admission(1, None, Throughput())
    call = Generation(IdleEngine(), admission.reserve(1, 8), keeps_seats=True)
    for name in ("a", "b"):
        call.start([request(name, 100)])
        call.deliver(RequestOutput(name, finish_reason=FinishReason.LENGTH))
        assert (admission.num_sequences, admission.num_queued_tokens) == (1, 8)
    call.close()
    assert (admission.num_sequences, admission.num_queued_tokens) == (0, 0)


async def test_at_its_deadline_a_call_is_aborted_and_its_reader_told():
    engine = IdleEngine()
    call = Generation(engine, Admission(1, None, Throughput()).reserve(1, 1))
    call.expire_after(0.0)
    call.start([request("a", 1)])
    call.deliver(RequestOutput("a", "text", 1))
    outputs = call.outputs()
    assert (await anext(outputs)).text == "text"
    with pytest.raises(DeadlineExceededError):
        await anext(outputs)
    assert call.is_expired
    assert engine.running == set()
    call.close()


async def test_a_deadline_after_the_end_takes_nothing_from_a_slow_reader():
    call = Generation(IdleEngine(), Admission(1, None, Throughput()).reserve(1, 1))
    call.start([request("a", 1)])
    call.deliver(RequestOutput("a", "text", 1, FinishReason.STOP))
    call._expire()
    assert [output.text async for output in call.outputs()] == ["text"]
    assert not call.is_expired


async def test_a_deadline_between_two_requests_of_a_call_that_keeps_its_seat_is_not_missed():
    call = Generation(IdleEngine(), Admission(1, None, Throughput()).reserve(1, 1), keeps_seats=True)
    call.start([request("a", 1)])
    call.deliver(RequestOutput("a", finish_reason=FinishReason.LENGTH))
    call._expire()
    outputs = call.outputs()
    assert (await anext(outputs)).request_id == "a"
    call.start([request("b", 1)])
    with pytest.raises(DeadlineExceededError):
        await anext(outputs)
    call.close()


def test_speed_is_tokens_over_busy_time_and_follows_what_is_recent():
    speed = Throughput()
    assert speed.tokens_per_second == 0.0
    for _ in range(10):
        speed.step_ran(50, 0.5)
    assert speed.tokens_per_second == pytest.approx(100.0)
    for _ in range(1200):
        speed.step_ran(10, 0.5)
    assert speed.tokens_per_second == pytest.approx(20.0, rel=1e-3)


def test_a_newcomer_waits_for_queued_prompts_and_outputs_as_long_as_the_last_ones():
    speed = Throughput()
    assert speed.retry_seconds(10**6, 50) == 1  # nothing is known yet
    speed.step_ran(1000, 10.0)
    assert speed.retry_seconds(1000, 0) == 10
    assert speed.retry_seconds(0, 0) == 1
    assert speed.retry_seconds(10**9, 0) == MAX_RETRY_SECONDS
    speed.request_finished(200)
    assert speed.retry_seconds(1000, 4) == 18
    for _ in range(100):
        speed.request_finished(50)
    assert speed.retry_seconds(999, 4) == 12
