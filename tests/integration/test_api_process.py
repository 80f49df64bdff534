"""``qerve serve`` as an operator runs it: processes, signals, exit statuses."""

import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.api_server import wait_until
from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.fake_process import fake_process
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

ROOT = Path(__file__).resolve().parents[2]
BODY = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
SERVE = [sys.executable, "-c", "from service.cli import main; main()", "serve"]


@pytest.fixture
def artifact(tmp_path):
    directory = tmp_path / "tiny-w4"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    return directory


def test_an_artifact_is_served_until_the_process_is_told_to_stop(artifact):
    command = [*SERVE, str(artifact), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(r"Serving tiny-w4 on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", line)
            assert match, line + process.stderr.read()
            with httpx.Client(base_url=match[1], trust_env=False, timeout=20) as client:
                assert client.get("/health/ready").status_code == 200
                body = {"model": "tiny-w4", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
                count = client.post("/tokenize", json={"prompt": "hi there", "return_token_strs": True}).json()
                assert len(count["token_strs"]) == count["count"] == len(count["tokens"]) > 0
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
        log = process.stderr.read()
    assert "SIGTERM: no new requests" in log
    assert "Traceback" not in log


def test_a_damaged_artifact_ends_the_process_with_one_clear_line(artifact):
    weights = next(artifact.glob("**/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    done = subprocess.run(
        [*SERVE, str(artifact), "--port", "0"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Serving" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert weights.name in line
    assert "Traceback" not in done.stderr


def test_while_the_model_loads_the_process_lives_and_refuses_everything_else(tmp_path):
    with fake_process(tmp_path, load_seconds=3.0) as server:
        wait_until(lambda: server.status("/health/live") == 200)
        for method, path in (("POST", "/v1/completions"), ("GET", "/health/ready"), ("GET", "/nothing")):
            response = server.client.request(method, path, headers={"x-request-id": "mine"})
            assert (response.status_code, response.json()["error"]["type"]) == (503, "ServiceUnavailableError")
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-request-id"] == "mine"
        server.wait_until_ready()
        assert server.client.post("/v1/completions", json=BODY).status_code == 200
        metrics = server.client.get("/metrics").text
        assert re.search(r'qerve_requests_rejected_total\{.*reason="loading"\} 2\.0', metrics)


def test_a_load_that_fails_ends_the_process_with_its_reason(tmp_path):
    with fake_process(tmp_path, load_seconds=0.5, is_damaged=True) as server:
        assert server.wait() == 1
        assert "error: the artifact was told to be damaged\n" in server.log
        assert "Traceback" not in server.log


def test_told_to_stop_while_it_loads_the_process_ends_at_once(tmp_path):
    with fake_process(tmp_path, load_seconds=600.0) as server:
        wait_until(lambda: server.status("/health/live") == 200)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_under_load_accepted_requests_finish_and_new_ones_are_refused(tmp_path):
    with fake_process(tmp_path, "--max-num-seqs", "2", "--max-queue", "4", step_seconds=0.02) as server:
        server.wait_until_ready()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            body = {**BODY, "max_tokens": 60}
            accepted = [pool.submit(server.client.post, "/v1/completions", json=body) for _ in range(6)]
            wait_until(lambda: 'num_requests_waiting{engine="0",model_name="fake"} 4.0' in _metrics(server))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.status("/health/ready") == 503)
            refused = server.client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            answers = [request.result() for request in accepted]
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [60] * 6
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_an_engine_that_keeps_failing_ends_the_process(tmp_path):
    with fake_process(tmp_path, fails_on=ord("#")) as server:
        server.wait_until_ready()
        for _ in range(2):
            assert server.client.post("/v1/completions", json={**BODY, "prompt": "#"}).status_code == 500
        assert server.client.post("/v1/completions", json=BODY).status_code == 200
        for _ in range(3):
            assert server.client.post("/v1/completions", json={**BODY, "prompt": "#"}).status_code == 500
        assert server.wait() == 1
        assert "error: the server has stopped: 3 steps of the engine failed in a row" in server.log


def test_a_full_disk_under_the_log_fails_no_request(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    with fake_process(tmp_path, "--log-level", "debug", log=full, fails_on=ord("#")) as server:
        server.wait_until_ready()
        assert server.client.post("/v1/completions", json={**BODY, "prompt": "#"}).status_code == 500
        assert server.client.post("/v1/completions", json=BODY).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_the_log_has_a_json_line_per_request_and_nothing_of_its_text(tmp_path):
    options = ("--log-format", "json", "--log-level", "debug")
    with fake_process(tmp_path, *options, fails_on=ord("#")) as server:
        server.wait_until_ready()
        marker = "MARKERtext"
        headers = {"x-request-id": "find-me"}
        server.client.post("/v1/completions", json={**BODY, "prompt": marker, "stop": ["MARKERstop"]}, headers=headers)
        server.client.post("/v1/completions", json={**BODY, "prompt": marker + "#"})
        server.client.post("/v1/completions", json={**BODY, "prompt": {"bad": marker}, "MARKERname": marker})
        server.client.post("/v1/completions", content=b"{" + marker.encode())
        server.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": marker}] * 9})
        server.client.post("/tokenize", json={"prompt": marker})
        server.client.post("/v1/perplexity", json={"text": marker})
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        lines = [json.loads(line) for line in server.log.splitlines()]
        assert "MARKERtext" not in server.log
        assert "MARKERstop" not in server.log
    requests = {line["request_id"]: line for line in lines if line["message"] == "request"}
    assert len(requests) >= 7
    mine = requests["find-me"]
    expected = {"method": "POST", "route": "/v1/completions", "status": 200, "prompt_tokens": 10, "output_tokens": 5}
    assert expected.items() <= mine.items()
    assert 0 < mine["ttft_seconds"] <= mine["duration_seconds"]
    assert mine["key_id"] == "anonymous"
    assert any("told to fail" in line.get("exception", "") for line in lines)


def test_keys_are_read_again_when_asked(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice:first\n")
    keys.chmod(0o600)
    with fake_process(tmp_path, "--api-keys-file", str(keys)) as server:
        server.wait_until_ready()
        first, second = ({"authorization": f"Bearer {key}"} for key in ("first", "second"))
        assert server.client.get("/v1/models", headers=first).status_code == 200
        assert server.client.get("/v1/models", headers=second).status_code == 401
        keys.write_text("# replaced\nalice:second\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.client.get("/v1/models", headers=second).status_code == 200)
        assert server.client.get("/v1/models", headers=first).status_code == 401
        keys.write_text("")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the API keys stay as they were" in server.log)
        assert server.client.get("/v1/models", headers=second).status_code == 200


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with fake_process(tmp_path, "--port", port, load_seconds=600.0) as server:
            assert server.wait() == 1
            assert f"error: port {port} on 127.0.0.1 is in use" in server.log


def _metrics(server):
    return server.client.get("/metrics").text
