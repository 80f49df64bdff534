"""Full queues, clients that leave, steps that fail, shutdown: nothing is lost, nothing leaks."""

import concurrent.futures
import json
import signal
import socket
import struct

import httpx
import pytest

from service.engine.async_engine import AsyncEngine
from tests.support.api_server import PATIENCE_SECONDS, live_server, wait_until
from tests.support.fake_model import BrokenModel, FakeModel, FakeParts, Faults

LONG = {"model": "fake", "prompt": "hello", "max_tokens": 200, "temperature": 0}
SHORT = {**LONG, "max_tokens": 3}


def slow_parts(step_seconds=0.01, **faults):
    return FakeParts(model=FakeModel(faults=Faults(step_seconds=step_seconds, **faults)))


@pytest.fixture
def server():
    with live_server(slow_parts(), max_num_seqs=2, max_queue=2) as live:
        yield live


def open_request(server, body, path="/v1/completions"):
    """A connection on which the request was sent and nothing was read."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(server.address, timeout=PATIENCE_SECONDS)
    connection.sendall(head.encode() + content)
    return connection


def reset(connection):
    """Close without the usual goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def running(server):
    return server.metric("qerve_num_requests_running")


def is_at_rest(server):
    nothing = (
        server.metric("qerve_kv_cache_usage_perc")
        == running(server)
        == server.metric("qerve_num_requests_waiting")
        == 0
    )
    return nothing and server.context.engine.is_idle


@pytest.mark.parametrize("leave", [socket.socket.close, reset, lambda c: c.shutdown(socket.SHUT_WR)])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server, leave, is_stream):
    connection = open_request(server, {**LONG, "stream": is_stream})
    wait_until(lambda: running(server) == 1)
    assert server.metric("qerve_kv_cache_usage_perc") > 0
    leave(connection)
    wait_until(lambda: is_at_rest(server))
    wait_until(lambda: server.metric("qerve_client_disconnects_total") == 1)
    assert server.metric("qerve_request_success_total", finished_reason="abort") == 1
    assert server.metric("qerve_generation_tokens_total") < 200
    connection.close()


def test_a_client_that_leaves_from_the_queue_is_forgotten(server):
    connections = [open_request(server, LONG) for _ in range(3)]
    wait_until(lambda: server.metric("qerve_num_requests_waiting") == 1)
    for connection in connections:
        connection.close()
    wait_until(lambda: is_at_rest(server))


def test_a_client_that_leaves_a_perplexity_request_stops_its_windows(server):
    connection = open_request(server, {"text": "x" * 2000, "window": 16, "stride": 1}, "/v1/perplexity")
    wait_until(lambda: not server.context.engine.is_idle)
    connection.close()
    wait_until(lambda: is_at_rest(server))
    wait_until(lambda: server.metric("qerve_client_disconnects_total") == 1)
    num_passes = len(server.context.loaded.model.batch_sizes)
    assert server.post("/v1/completions", json=SHORT).status_code == 200
    assert len(server.context.loaded.model.batch_sizes) <= num_passes + 4  # at most the window that was under way


def test_a_full_queue_answers_429_with_retry_after_and_recovers(server):
    connections = [open_request(server, LONG) for _ in range(4)]
    wait_until(lambda: running(server) == 2 and server.metric("qerve_num_requests_waiting") == 2)
    for body, path in ((SHORT, "/v1/completions"), ({"text": "hello"}, "/v1/perplexity")):
        response = server.post(path, json=body)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "RateLimitError"
    assert server.metric("qerve_requests_rejected_total", reason="queue_full") == 2
    for connection in connections:
        connection.close()
    wait_until(lambda: is_at_rest(server))
    assert server.post("/v1/completions", json=SHORT).status_code == 200


def test_a_refused_request_gives_its_seats_back(server):
    for _ in range(10):
        assert server.post("/v1/completions", json={**SHORT, "prompt": ["x" * 255] * 3}).status_code == 400
    assert server.context.engine.is_idle


def test_a_failing_step_is_a_500_for_its_requests_and_the_server_goes_on(caplog):
    with live_server(slow_parts(0.0, fails_on=ord("#"))) as server:
        response = server.post("/v1/completions", json={**SHORT, "prompt": "a#b"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "InternalServerError"
        assert "told to fail" not in response.text
        events = server.events("/v1/completions", {**SHORT, "prompt": "a#b"})
        assert events[-1]["error"]["code"] == 500
        assert server.post("/v1/completions", json=SHORT).status_code == 200
        assert is_at_rest(server)
        assert server.metric("qerve_request_success_total", finished_reason="error") == 2
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def test_a_stream_that_fails_midway_says_so_and_ends():
    model = FakeModel()
    third = model.continue_greedily(b"hello", 3)[-1]
    with live_server(FakeParts(model=BrokenModel(faults=Faults(nan_on=third))), canary=False) as server:
        *deltas, last = server.events("/v1/completions", LONG)
        assert 1 <= len(deltas) <= 3
        assert last["error"]["type"] == "InternalServerError"
        assert server.metric("qerve_nonfinite_logits_total") == 1
        assert server.metric("qerve_client_disconnects_total") == 0


def test_an_unexpected_exception_is_a_500_logged_once_with_the_request_id(server, caplog, monkeypatch):
    def broken(self, num_sequences):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(AsyncEngine, "admit", broken)
    response = server.post("/v1/completions", json=SHORT, headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "find-me"
    assert "find-me" in response.json()["error"]["message"]
    assert "defect" not in response.text
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert "find-me" in logged[0].getMessage()
    wait_until(lambda: server.metric("qerve_http_requests_total", path="/v1/completions", status="500") == 1)


def test_when_told_to_stop_accepted_requests_finish_and_new_ones_get_503(server):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        body = {**LONG, "max_tokens": 60}
        accepted = [pool.submit(httpx.post, server.url + "/v1/completions", json=body) for _ in range(4)]
        wait_until(lambda: running(server) == 2 and server.metric("qerve_num_requests_waiting") == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.context.engine.is_draining)
        refused = server.post("/v1/completions", json=SHORT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert server.get("/health/ready").status_code == 503
        assert server.get("/health/live").status_code == 200
        answers = [request.result() for request in accepted]
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [60] * 4
    wait_until(lambda: server.server.should_exit)
    assert server.metric("qerve_requests_rejected_total", reason="draining") == 1


def test_what_still_runs_when_patience_ends_gets_an_error_and_the_server_stops():
    with (
        live_server(slow_parts(0.05), drain_timeout_seconds=0.2) as server,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        whole = pool.submit(httpx.post, server.url + "/v1/completions", json=LONG, timeout=PATIENCE_SECONDS)
        stream = pool.submit(server.events, "/v1/completions", LONG)
        wait_until(lambda: running(server) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        assert whole.result().status_code == 500
        assert "shutting down" in stream.result()[-1]["error"]["message"]
        wait_until(lambda: server.server.should_exit)


def test_a_second_signal_does_not_wait():
    with live_server(slow_parts(0.05)) as server:
        connection = open_request(server, LONG)
        wait_until(lambda: running(server) == 1)
        server.server.handle_exit(signal.SIGINT, None)
        server.server.handle_exit(signal.SIGINT, None)
        assert server.server.should_exit
        connection.close()
