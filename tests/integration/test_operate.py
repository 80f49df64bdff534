"""A served artifact as its operator sees it: memory that adds up, metrics on their port, weights that go bad."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from models.artifact.format import Probe
from models.artifact.load import load_artifact
from models.build.host_memory import predict_host_memory
from models.errors import QerveError
from models.evaluate.perplexity import perplexity
from models.llama.native import NativeLlama
from service.metrics.server import metrics_server
from tests.support.api_server import live_loaded_server, wait_until
from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.fake_process import fake_process
from tests.support.native import needs_native
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-c", "from service.cli import main; main()", "serve"]
PROBE = [3 + (7 * i) % (VOCAB_SIZE - 3) for i in range(96)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A small artifact whose probe has the perplexity that it is served with."""
    directory = tmp_path_factory.mktemp("artifacts") / "tiny"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    nll = perplexity(load_artifact(directory).model, PROBE, window=len(PROBE)).nll
    probed = directory.with_name("tiny-probed")
    probe = Probe(token_ids=tuple(PROBE), dense_nll=nll, quantized_nll=nll)
    write_artifact(probed, model, tokenizer_files=tokenizer_files(), probe=probe)
    return probed


def values_of(text, name):
    """Labels' values joined -> value."""
    families = text_string_to_metric_families(text)
    return {"".join(s.labels.values()): s.value for family in families for s in family.samples if s.name == name}


def test_the_components_explain_the_resident_memory_and_metrics_have_their_own_port(artifact):
    """The interpreter and the libraries are most of it here; the larger the artifact, the less they are."""
    command = [*SERVE, str(artifact), "--port", "0", "--metrics-port", "0", "--api-key", "secret"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
            port = re.search(r"metrics on http://127\.0\.0\.1:(\d+)", line)[1]
            with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
                key = {"authorization": "Bearer secret"}
                body = {"prompt": "hello there", "max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
                for _ in range(3):
                    assert client.post("/v1/completions", json=body, headers=key).status_code == 200
                assert client.get("/metrics", headers=key).status_code == 404
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
    resident = values_of(text, "process_resident_memory_bytes")[""]
    parts = values_of(text, "qerve_memory_component_bytes")
    assert {"libraries", "interpreter", "weights", "kv_cache", "allocator"} <= parts.keys()
    assert 0.9 < sum(parts.values()) / resident < 1.05, parts
    assert parts["kv_cache"] > 0
    phases = values_of(text, "qerve_startup_seconds")
    assert {name.removeprefix("0tiny-probed").removeprefix("tiny-probed0") for name in phases} == {
        "imports", "load", "prepare", "canary",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in phases.values())
    assert predict_host_memory(artifact).loaded_bytes == pytest.approx(resident, rel=0.15)


def test_the_weights_in_memory_are_predicted_from_the_manifest(artifact):
    loaded = load_artifact(artifact)
    assert predict_host_memory(artifact).weights == sum(loaded.resident_bytes.values())


def test_a_port_for_metrics_answers_with_them_and_one_that_is_taken_is_an_error():
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc()
    with metrics_server("127.0.0.1", 0, registry) as url:
        assert "things_total 1.0" in httpx.get(f"{url}/metrics", trust_env=False).text
        port = int(url.rpartition(":")[2])
        refused = pytest.raises(QerveError, match=f"port {port} on 127.0.0.1 is in use: choose another --metrics-port")
        with refused, metrics_server("127.0.0.1", port, registry):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/metrics", trust_env=False)


@needs_native
def test_bytes_that_flip_in_the_packed_weights_take_the_server_out_of_rotation(artifact):
    loaded = load_artifact(artifact)
    assert isinstance(loaded.model, NativeLlama)
    strips = loaded.model.weights.layers[0].down_proj.matrices[0].strips
    settings = {"model_name": "tiny", "canary_interval_seconds": 0.05, "kv_cache_memory": "4MiB"}
    with live_loaded_server(loaded, **settings) as server:
        wait_until(lambda: server.metric("qerve_canary_checks_total", result="ok") >= 2)
        good = server.metric("qerve_canary_perplexity")
        assert good == pytest.approx(math.exp(loaded.manifest.probe.quantized_nll), rel=1e-4)
        strips.bitwise_xor_(0x40)
        wait_until(lambda: server.get("/health/ready").status_code == 503)
        assert server.metric("qerve_canary_ok") == 0
        bad = server.metric("qerve_canary_perplexity")
        assert math.isnan(bad) or abs(bad / good - 1) > 0.1
        strips.bitwise_xor_(0x40)
        wait_until(lambda: server.get("/health/ready").status_code == 200)
        assert server.metric("qerve_canary_perplexity") == pytest.approx(good, rel=1e-9)


def test_every_request_has_one_line_whatever_becomes_of_it(tmp_path):
    with fake_process(tmp_path, "--log-format", "json", "--api-key", "k", load_seconds=2.0) as server:
        wait_until(lambda: server.status("/health/live") == 200)
        key = {"authorization": "Bearer k"}
        sent = {}

        def send(request_id, method, path, **options):
            headers = {"x-request-id": request_id, **options.pop("headers", key)}
            sent[request_id] = server.client.request(method, path, headers=headers, **options).status_code

        body = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
        send("loading", "POST", "/v1/completions", json=body)
        server.wait_until_ready()
        send("good", "POST", "/v1/completions", json=body)
        send("stream", "POST", "/v1/completions", json={**body, "stream": True})
        send("bad", "POST", "/v1/completions", json={"prompt": ""})
        send("nowhere", "GET", "/nothing")
        send("refused", "GET", "/v1/models", headers={})
        send("scrape", "GET", "/metrics")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        lines = [json.loads(line) for line in server.log.splitlines()]
    lines = [line for line in lines if line.get("message") == "request"]
    assert sorted(line["request_id"] for line in lines) == sorted(sent)
    by_id = {line["request_id"]: line for line in lines}
    assert {name: line["status"] for name, line in by_id.items()} == sent
    assert {name: line["route"] for name, line in by_id.items()} == {
        "loading": "unmatched", "good": "/v1/completions", "stream": "/v1/completions", "bad": "/v1/completions",
        "nowhere": "unmatched", "refused": "unmatched", "scrape": "/metrics",
    }  # fmt: skip
    for name in ("good", "stream"):
        assert (by_id[name]["output_tokens"], by_id[name]["finish_reasons"]) == (5, "length")
        assert 0 < by_id[name]["ttft_seconds"] <= by_id[name]["duration_seconds"]
