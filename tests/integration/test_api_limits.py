"""Limits that an operator sets, each at its edge, and deadlines."""

import concurrent.futures
import json

import openai
import pytest

from tests.support.api_server import live_server, wait_until
from tests.support.fake_model import FakeModel, FakeParts, Faults

BODY = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
LONG = {**BODY, "max_tokens": 200}
JSON_TYPE = {"content-type": "application/json"}


def slow_parts(step_seconds=0.01):
    return FakeParts(model=FakeModel(faults=Faults(step_seconds=step_seconds)))


def is_at_rest(server):
    engine = server.context.engine
    return engine.is_idle and server.metric("qerve_kv_cache_usage_perc") == 0 and not engine.admission.num_queued_tokens


@pytest.fixture(scope="module")
def strict():
    limits = {
        "max_prompts": 2,
        "max_choices": 2,
        "max_json_depth": 4,
        "max_body_bytes": 500,
        "max_perplexity_windows": 3,
    }
    with live_server(**limits) as live:
        yield live


@pytest.mark.parametrize(
    ("path", "accepted", "refused", "param"),
    [
        ("/v1/completions", {**BODY, "prompt": ["a"] * 2}, {**BODY, "prompt": ["a"] * 3}, "prompt"),
        ("/v1/completions", {**BODY, "n": 2}, {**BODY, "n": 3}, "n"),
        ("/v1/completions", {**BODY, "x": [[[1]]]}, {**BODY, "x": [[[[1]]]]}, None),
        ("/v1/perplexity", {"text": "x" * 10, "window": 4, "stride": 3}, {"text": "x" * 16, "window": 4}, "stride"),
        ("/v1/completions", {**BODY, "prompt": "x" * 253}, {**BODY, "prompt": "x" * 254}, "max_tokens"),
    ],
    ids=["prompts", "n", "depth", "windows", "context"],
)
def test_what_is_at_a_limit_is_done_and_one_more_is_refused(strict, path, accepted, refused, param):
    assert strict.post(path, json=accepted).status_code == 200
    answer = strict.post(path, json=refused)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert is_at_rest(strict)


def test_a_body_of_the_largest_size_and_one_byte_more(strict):
    content = json.dumps(BODY).encode()
    padding = b" " * (500 - len(content))
    assert strict.post("/v1/completions", content=content + padding, headers=JSON_TYPE).status_code == 200
    assert strict.post("/v1/completions", content=content + padding + b" ", headers=JSON_TYPE).status_code == 413


def test_the_over_long_prompt_is_told_in_words_that_client_libraries_look_for(strict):
    message = strict.post("/v1/completions", json={**BODY, "prompt": "x" * 300}).json()["error"]["message"]
    assert message.startswith("This model's maximum context length is 256 tokens")


def test_prompts_that_wait_are_limited_by_their_tokens_too():
    with live_server(slow_parts(0.02), max_num_seqs=1, max_queue=50, max_queued_tokens=100) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = pool.submit(server.post, "/v1/completions", json={**BODY, "max_tokens": 60})
            wait_until(lambda: server.metric("qerve_num_requests_running") == 1)
            waiting = pool.submit(server.post, "/v1/completions", json={**BODY, "prompt": "x" * 90})
            wait_until(lambda: server.metric("qerve_num_queued_tokens") == 90)
            # Both are too many, one by its length in characters and one only once it is tokenized.
            for prompt in ([1] * 11, "x" * 30):
                refused = server.post("/v1/completions", json={**BODY, "prompt": prompt})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["retry-after"] in refused.json()["error"]["message"]
            assert server.post("/v1/completions", json={**BODY, "prompt": [1] * 10}).status_code == 200
            assert [call.result().status_code for call in (running, waiting)] == [200, 200]
        assert server.metric("qerve_requests_rejected_total", reason="kv_budget") == 2
        wait_until(lambda: is_at_rest(server))


def test_a_request_that_takes_too_long_is_a_408_and_frees_what_it_holds():
    with live_server(slow_parts(), request_timeout_seconds=0.3) as server:
        response = server.post("/v1/completions", json=LONG)
        assert response.status_code == 408
        assert response.json()["error"]["type"] == "RequestTimeoutError"
        assert response.headers["x-should-retry"] == "false"
        wait_until(lambda: is_at_rest(server))
        assert server.metric("qerve_deadline_exceeded_total") == 1
        *deltas, last = server.events("/v1/completions", LONG)
        assert deltas
        assert last["error"]["code"] == 408
        wait_until(lambda: server.metric("qerve_deadline_exceeded_total") == 2)
        response = server.post("/v1/perplexity", json={"text": "x" * 2000, "window": 16, "stride": 1})
        assert response.status_code == 408
        wait_until(lambda: is_at_rest(server))
        assert server.post("/v1/completions", json=BODY).status_code == 200


def test_a_client_may_ask_for_less_time_and_not_for_more():
    with live_server(slow_parts(), request_timeout_seconds=0.5) as server:
        short = server.post("/v1/completions", json=LONG, headers={"x-request-timeout": "0.05"})
        assert short.status_code == 408
        assert server.post("/v1/completions", json=LONG, headers={"x-request-timeout": "60"}).status_code == 408
        assert server.post("/v1/completions", json=BODY, headers={"x-request-timeout": "60"}).status_code == 200
        for nonsense in ("0", "-1", "nan", "inf", "soon", ""):
            response = server.post("/v1/completions", json=BODY, headers={"x-request-timeout": nonsense})
            assert response.status_code == 400, nonsense
            assert response.json()["error"]["param"] == "x-request-timeout"


def test_a_body_that_never_ends_is_given_up():
    with live_server(request_timeout_seconds=0.3) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\nConnection: close\r\n\r\n{"
        assert server.raw(head).startswith(b"HTTP/1.1 408")
        wait_until(lambda: server.metric("qerve_deadline_exceeded_total") == 1)


def test_the_official_client_does_not_repeat_what_took_too_long():
    with live_server(slow_parts(), request_timeout_seconds=0.2) as server:
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=3) as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.completions.create(model="fake", prompt="hello", max_tokens=200)
        assert caught.value.status_code == 408
        assert server.metric("qerve_http_requests_total", path="/v1/completions") == 1
