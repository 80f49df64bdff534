"""The engine's thread: delivery, admission, aborts, the end."""

import asyncio

import pytest

from service.engine.admission import DrainingError, QueueFullError
from service.engine.async_engine import AsyncEngine
from service.engine.request import FinishReason
from tests.support.fake_model import FakeModel, Faults
from tests.unit.test_engine_step import greedy_text, make_engine, make_request


@pytest.fixture
async def running():
    """Starts async engines and ends them with the test."""
    started = []

    def start(model=None, capacity=8, **options):
        engine = AsyncEngine(make_engine(model, **options), capacity)
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        await engine.stop()
        assert not engine.is_running


async def collect(generation, requests):
    generation.start(requests)
    texts = {request.request_id: "" for request in requests}
    reasons = {}
    async for output in generation.outputs():
        texts[output.request_id] += output.text
        if output.finish_reason:
            reasons[output.request_id] = output.finish_reason
    generation.close()
    return texts, reasons


async def test_concurrent_calls_get_their_own_texts_and_share_steps(running):
    model = FakeModel(faults=Faults(step_seconds=0.002))
    engine = running(model)
    prompts = ["one", "two", "three", "four"]
    calls = [collect(engine.admit(1), [make_request(prompt, prompt)]) for prompt in prompts]
    results = await asyncio.gather(*calls)
    assert {name: text for texts, _ in results for name, text in texts.items()} == {p: greedy_text(p) for p in prompts}
    assert max(model.batch_sizes) > 1
    assert engine.is_idle


async def test_one_call_may_have_several_requests(running):
    engine = running()
    texts, reasons = await collect(engine.admit(3), [make_request(name, name) for name in ("a", "b", "c")])
    assert texts == {name: greedy_text(name) for name in ("a", "b", "c")}
    assert set(reasons.values()) == {FinishReason.LENGTH}


async def test_admission_is_counted_before_any_work_and_given_back_on_every_path(running):
    engine = running(capacity=3)
    first = engine.admit(2)
    with pytest.raises(QueueFullError):
        engine.admit(2)
    second = engine.admit(1)
    first.close()
    first.close()
    await collect(second, [make_request("a")])
    second.close()
    assert engine.is_idle
    engine.admit(3).close()
    assert engine.is_idle


async def test_closing_a_call_aborts_what_runs_and_frees_its_blocks(running):
    model = FakeModel(faults=Faults(step_seconds=0.005))
    engine = running(model)
    generation = engine.admit(1)
    generation.start([make_request("a", max_tokens=200)])
    assert await anext(generation.outputs())
    generation.close()
    blocks = engine._engine.scheduler.blocks
    while blocks.num_used_blocks:  # the thread takes it from its inbox
        await asyncio.sleep(0.001)
    assert engine.is_idle


async def test_a_call_that_keeps_its_seats_runs_request_after_request_on_them(running):
    engine = running(capacity=2)
    call = engine.admit(1, keeps_seats=True)
    texts = {}
    for name in ("one", "two", "three"):
        call.start([make_request(name, name)])
        async for output in call.outputs():
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
        with pytest.raises(QueueFullError):
            engine.admit(2)
    call.close()
    assert texts == {name: greedy_text(name) for name in ("one", "two", "three")}
    assert engine.is_idle


async def test_a_request_the_engine_cannot_queue_fails_alone(running, caplog):
    engine = running(num_blocks=2)
    _, reasons = await collect(engine.admit(1), [make_request("big", "x" * 100)])
    assert reasons == {"big": FinishReason.ERROR}
    assert (await collect(engine.admit(1), [make_request("a", max_tokens=5)]))[0]["a"] == greedy_text("hello", 5)
    assert "cannot be queued" in caplog.text


async def test_the_loop_survives_an_exception_outside_a_step(running, caplog):
    engine = running()
    generation = engine.admit(1)

    def broken_step():
        del engine._engine.step
        raise RuntimeError("outside")

    engine._engine.step = broken_step
    _, reasons = await collect(generation, [make_request("a")])
    assert reasons == {"a": FinishReason.ERROR}
    assert engine.is_running
    assert (await collect(engine.admit(1), [make_request("b")]))[0]["b"] == greedy_text("hello")


async def test_draining_refuses_new_calls_and_lets_admitted_ones_finish(running):
    engine = running(FakeModel(faults=Faults(step_seconds=0.002)))
    generation = engine.admit(1)
    engine.begin_drain()
    with pytest.raises(DrainingError):
        engine.admit(1)
    assert (await collect(generation, [make_request("a")]))[1] == {"a": FinishReason.LENGTH}
    assert engine.is_idle


async def test_stopping_ends_running_waiting_and_late_requests_with_an_error(running):
    engine = running(FakeModel(faults=Faults(step_seconds=0.01)), max_num_seqs=1)
    calls = [engine.admit(1) for _ in range(3)]
    early = [
        asyncio.create_task(collect(call, [make_request(str(i), max_tokens=200)])) for i, call in enumerate(calls[:2])
    ]
    await asyncio.sleep(0.03)
    await engine.stop()
    late = collect(calls[2], [make_request("late")])
    for work in (*early, late):
        _, reasons = await work
        assert set(reasons.values()) == {FinishReason.ERROR}
    with pytest.raises(DrainingError):
        engine.admit(1)
