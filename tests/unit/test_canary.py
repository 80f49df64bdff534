"""The quality canary over a fake network: when it runs, when it gives way, what readiness and metrics then say."""

import asyncio
import concurrent.futures
import dataclasses
import math
import time

import pytest

from models.artifact.format import Probe
from service.engine.block_manager import BlockManager
from service.engine.generation import GaveWayError
from service.engine.request import FinishReason, Request, SamplingParams
from service.engine.scheduler import BACKGROUND_TOKENS, Scheduler
from tests.support.api_server import live_loaded_server, live_server, wait_until
from tests.support.fake_model import PROBE, FakeModel, FakeParts, Faults

LONG = {"prompt": "hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
OFTEN = {"canary_interval_seconds": 0.02, "model_name": "fake", "kv_cache_memory": "64KiB", "max_num_seqs": 4}


class DamagedModel(FakeModel):
    """Its logits have a constant added to some of them while ``damage`` is not 0."""

    damage = 0.0

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[:, ::2] += self.damage
        return logits


def checks(server, result):
    return server.metric("qerve_canary_checks_total", result=result)


def test_the_probe_is_scored_before_the_first_request():
    parts = FakeParts()
    with live_server(parts) as server:
        expected = math.exp(parts.probe_nll())
        assert server.metric("qerve_canary_perplexity") == pytest.approx(expected, rel=1e-4)
        assert server.metric("qerve_canary_expected_perplexity") == pytest.approx(expected, rel=1e-6)
        assert (checks(server, "ok"), server.metric("qerve_canary_ok"), server.metric("qerve_ready")) == (1, 1, 1)
        assert abs(server.metric("qerve_canary_timestamp_seconds") - time.time()) < 60
        assert server.metric("qerve_startup_seconds", phase="canary") > 0


def test_what_the_canary_computes_is_not_counted_as_users_and_leaves_nothing_behind():
    with live_server() as server:
        assert checks(server, "ok") == 1
        for name in ("prompt_tokens_total", "prefix_cache_queries_total", "iteration_tokens_total_count"):
            assert server.metric(f"qerve_{name}") == 0, name
        assert server.metric("qerve_kv_cache_bytes", kind="cached") == 0
        assert server.context.engine.throughput.tokens_per_second == 0


def test_weights_that_change_while_serving_make_it_unready_until_they_are_right_again():
    model = DamagedModel()
    with live_loaded_server(FakeParts(model).loaded(), **OFTEN) as server:
        wait_until(lambda: checks(server, "ok") >= 2)
        good = server.metric("qerve_canary_perplexity")
        model.damage = 5.0
        wait_until(lambda: server.get("/health/ready").status_code == 503)
        error = server.get("/health/ready").json()["error"]
        assert "probe" in error["message"]
        assert server.metric("qerve_canary_perplexity") > 1.1 * good
        assert (server.metric("qerve_canary_ok"), server.metric("qerve_ready")) == (0, 0)
        assert server.get("/health/live").status_code == 200
        assert server.post("/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200  # at one's own risk
        model.damage = 0.0
        wait_until(lambda: server.get("/health/ready").status_code == 200)
        assert server.metric("qerve_canary_ok") == 1


def test_a_model_that_is_wrong_from_the_start_is_never_ready():
    model = DamagedModel()
    loaded = FakeParts(model).loaded()
    model.damage = 5.0
    with live_loaded_server(loaded, model_name="fake", kv_cache_memory="64KiB") as server:
        assert server.get("/health/ready").status_code == 503
        assert checks(server, "out_of_tolerance") == 1


def test_values_that_are_not_finite_are_a_failure_and_not_a_number():
    model = DamagedModel()
    loaded = FakeParts(model).loaded()
    model.damage = math.nan
    with live_loaded_server(loaded, model_name="fake", kv_cache_memory="64KiB") as server:
        assert server.get("/health/ready").status_code == 503
        assert math.isnan(server.metric("qerve_canary_perplexity"))
        assert (checks(server, "failed"), server.metric("qerve_canary_ok")) == (1, 0)


def test_it_waits_while_a_request_runs():
    with live_loaded_server(FakeParts(FakeModel(faults=Faults(step_seconds=0.02))).loaded(), **OFTEN) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, "/v1/completions", json=LONG)
            wait_until(lambda: server.metric("qerve_num_requests_running") == 1)
            before = checks(server, "ok")
            wait_until(lambda: checks(server, "aborted") >= 1)
            assert (checks(server, "ok"), answer.done()) == (before, False)
        assert answer.result().status_code == 200


def test_a_call_that_comes_takes_the_engine_from_one_that_nobody_waits_for():
    with live_server(FakeParts(FakeModel(faults=Faults(step_seconds=0.2)))) as server:
        engine = server.context.engine
        loop = engine._event_loop

        async def race():
            with engine.background() as call:
                params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
                call.start([Request("background", PROBE * 5, params, is_background=True)])
                user = engine.admit(1)
                try:
                    with pytest.raises(GaveWayError):
                        async for _ in call.outputs():
                            pass
                    with engine.background() as other:
                        assert other is None
                finally:
                    user.close()
            return engine.is_idle

        assert asyncio.run_coroutine_threadsafe(race(), loop).result(20)
        wait_until(lambda: server.metric("qerve_kv_cache_usage_perc") == 0)


@pytest.mark.parametrize(
    ("settings", "probe", "words"),
    [
        ({"canary": False}, PROBE, "turned off"),
        ({}, None, "holds no probe"),
        ({"max_model_len": 16}, PROBE, "does not fit max_model_len 16"),
    ],
)
def test_without_a_canary_the_log_says_why(caplog, settings, probe, words):
    loaded = FakeParts().loaded()
    found = None if probe is None else Probe(token_ids=tuple(probe), dense_nll=1.0, quantized_nll=1.0)
    loaded = dataclasses.replace(loaded, manifest=loaded.manifest.model_copy(update={"probe": found}))
    with caplog.at_level("INFO"), live_loaded_server(loaded, model_name="fake", **settings) as server:
        assert server.get("/health/ready").status_code == 200
        assert server.metric("qerve_canary_ok") is None
    assert any(words in record.getMessage() for record in caplog.records if record.name == "qerve.canary")


def background_request(num_tokens):
    params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
    return Request("b", list(range(num_tokens)), params, is_background=True)


def test_what_nobody_waits_for_is_computed_in_small_steps_and_is_found_by_nobody():
    blocks = BlockManager(64)
    scheduler = Scheduler(blocks, 4, 512)
    request = background_request(200)
    scheduler.add(request)
    sizes = []
    while not request.is_prompt_computed:
        (item,) = scheduler.schedule()
        sizes.append(item.num_tokens)
        scheduler.advance(request, item.num_tokens)
    assert sum(sizes) == 200
    assert max(sizes) <= BACKGROUND_TOKENS
    scheduler.finish(request, FinishReason.LENGTH)
    assert (blocks.num_used_blocks, blocks.num_cached_blocks) == (0, 0)
