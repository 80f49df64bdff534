"""Readers that stall, engines that fail, values that are not finite, caches that are full: nothing hangs or leaks."""

import concurrent.futures
import json
import socket

import httpx

from tests.support.api_server import PATIENCE_SECONDS, live_server, wait_until
from tests.support.fake_model import BrokenModel, FakeModel, FakeParts, Faults

LONG = {"prompt": "hello", "max_tokens": 200, "temperature": 0}
SHORT = {**LONG, "max_tokens": 3}


def parts(model=FakeModel, context=256, **faults):
    return FakeParts(model=model(context, Faults(**faults)))


def is_at_rest(server):
    return server.context.engine.is_idle and server.metric("qerve_kv_cache_usage_perc") == 0


def test_a_reader_that_stalls_is_dropped_and_frees_its_blocks():
    """A stream of 32 choices, and a connection whose two small buffers are soon full."""
    long = {"prompt": ["x" * 8] * 32, "max_tokens": 3900, "stream": True, "ignore_eos": True}
    options = {"max_num_seqs": 32, "kv_cache_memory": "8MiB", "sse_write_timeout_seconds": 0.5}
    with live_server(parts(context=4096), **options) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(server.address)
        content = json.dumps(long).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: server.metric("qerve_num_requests_running") == 32)
        wait_until(lambda: server.metric("qerve_stalled_readers_total") == 1)
        wait_until(lambda: is_at_rest(server))
        assert server.metric("qerve_client_disconnects_total") == 0
        assert server.metric("qerve_request_success_total", finished_reason="abort") == 32
        assert server.post("/v1/completions", json=SHORT).status_code == 200
        connection.close()


def test_a_slow_reader_gets_everything():
    with (
        live_server(sse_write_timeout_seconds=1.0) as server,
        httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, trust_env=False) as answer,
    ):
        text = "".join(answer.iter_text(64))
        assert text.endswith("data: [DONE]\n\n")
        assert server.metric("qerve_stalled_readers_total") == 0


def test_failures_in_a_row_end_the_engine_and_the_server_with_it(caplog):
    with live_server(parts(fails_on=ord("#")), max_failed_steps=2) as server:
        for _ in range(3):  # not in a row
            assert server.post("/v1/completions", json={**SHORT, "prompt": "#"}).status_code == 500
            assert server.post("/v1/completions", json=SHORT).status_code == 200
        assert server.get("/health/ready").status_code == 200
        for _ in range(2):
            assert server.post("/v1/completions", json={**SHORT, "prompt": "#"}).status_code == 500
        wait_until(lambda: server.server.should_exit)
        assert server.server.failure == "2 steps of the engine failed in a row"
        assert not server.context.engine.is_ready
        assert is_at_rest(server)
    assert "Traceback" in caplog.text


def test_a_thread_that_dies_ends_every_request_and_the_server(caplog):
    with live_server(parts(step_seconds=0.01)) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(server.post, "/v1/completions", json=LONG) for _ in range(2)]
        wait_until(lambda: server.metric("qerve_num_requests_running") == 2)

        def die():
            raise SystemExit

        server.context.engine._post(die)
        assert [call.result().status_code for call in calls] == [500, 500]
        wait_until(lambda: server.server.should_exit)
        assert server.server.failure == "the engine's thread has ended"
    assert "the engine's thread ends" in caplog.text


def test_a_model_that_makes_nonsense_is_not_ready_until_it_makes_sense():
    with live_server(parts(BrokenModel, nan_on=ord("#"))) as server:
        for _ in range(3):
            assert server.get("/health/ready").status_code == 200
            assert server.post("/v1/completions", json={**SHORT, "prompt": "#"}).status_code == 500
        assert server.metric("qerve_nonfinite_logits_total") == 3
        ready = server.get("/health/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert server.get("/health/live").status_code == 200
        assert server.post("/v1/completions", json=SHORT).status_code == 200
        assert server.get("/health/ready").status_code == 200
        assert is_at_rest(server)


def test_when_the_cache_is_full_requests_wait_and_all_end():
    """Room for 256 tokens, and 12 requests of 100."""
    with (
        live_server(kv_cache_memory="2KiB", max_num_seqs=8, max_queue=12) as server,
        concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
        assert server.context.info.max_model_len == 256
        body = {**LONG, "prompt": "x" * 50, "max_tokens": 50}
        answers = [pool.submit(server.post, "/v1/completions", json=body) for _ in range(12)]
        texts = {answer.result().json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert is_at_rest(server)


def test_a_step_that_hangs_does_not_keep_the_server_from_ending():
    """The engine's thread is given up after its patience; the process then ends without it."""
    with live_server(parts(step_seconds=2.0), drain_timeout_seconds=0.0, canary=False) as server:
        engine = server.context.engine
        stop, engine.stop = engine.stop, lambda: stop(patience_seconds=0.05)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(httpx.post, server.url + "/v1/completions", json=LONG, timeout=PATIENCE_SECONDS)
            wait_until(lambda: server.metric("qerve_num_requests_running") == 1)
            server.server.handle_exit(15, None)
            assert call.result().status_code == 500


def test_a_step_that_never_ends_is_noticed_and_ends_the_server():
    with live_server(parts(step_seconds=4.0), step_timeout_seconds=0.3, canary=False) as server:
        answer = server.post("/v1/completions", json=SHORT)
        assert answer.status_code == 500
        wait_until(lambda: not server.server.started or server.server.should_exit)
        assert "does not end after 0.3 seconds" in server.server.failure
        assert not server.context.engine.is_ready
