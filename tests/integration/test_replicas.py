"""Replicas behind Ray Serve, on a Ray cluster of this machine alone."""

import httpx
import pytest

from models.errors import QerveError
from tests.support.api_server import wait_until
from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files
from tools.demo_server import free_port

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'qerve[ray]'")
serve = pytest.importorskip("ray.serve")
replicas = pytest.importorskip("service.replicas")

# Ray's own processes and pipes are closed by its shutdown, not by the interpreter's reference counts.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
GENERATION = {"prompt": "hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def write_tiny(directory):
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    return directory


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    artifact = write_tiny(tmp_path_factory.mktemp("artifacts") / "tiny-w4")
    port = free_port(8300)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = replicas.ReplicaOptions(artifact=artifact, num_replicas=2, settings={"max_model_len": 64})
        serve.run(replicas.app(options), name="qerve", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def samples(client, name):
    lines = client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]


@pytest.mark.slow
def test_both_replicas_answer_alike_and_each_reports_what_it_did(client):
    texts = [client.post("/v1/completions", json=GENERATION).json()["choices"][0]["text"] for _ in range(24)]
    assert len(set(texts)) == 1
    counts = samples(client, "qerve_generation_tokens_total")
    assert len({line.split('replica="')[1].split('"')[0] for line in counts}) == 2
    assert sum(float(line.rsplit(" ", 1)[1]) for line in counts) == 24 * 5
    assert all(float(line.rsplit(" ", 1)[1]) > 0 for line in counts)


@pytest.mark.slow
def test_a_refusal_keeps_its_shape_and_a_setting_reaches_the_replicas(client):
    answer = client.post("/v1/completions", json={**GENERATION, "max_tokens": 100})
    assert answer.status_code == 400
    assert answer.json()["error"]["n_ctx"] == 64


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_place(client):
    body = {**GENERATION, "max_tokens": 60, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())

    def is_idle():
        lines = samples(client, "qerve_num_requests_running")
        return len(lines) == 2 and all(line.endswith(" 0.0") for line in lines)

    wait_until(is_idle)


def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path):
    options = replicas.ReplicaOptions(artifact=tmp_path, settings={"max_num_seqs": 0})
    with pytest.raises(QerveError, match="max_num_seqs"):
        replicas.app(options)


def test_bounds_of_the_scaling_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="min_replicas 3 is more than max_replicas 2"):
        replicas.ReplicaOptions(artifact=tmp_path, min_replicas=3, max_replicas=2)


def test_the_deployment_takes_as_many_requests_as_a_replica_runs_or_refuses_itself(tmp_path):
    settings = {"max_num_seqs": 4, "max_queue": 10, "drain_timeout_seconds": 7}
    application = replicas.app(replicas.ReplicaOptions(artifact=tmp_path, num_cpus=2, settings=settings))
    deployment = application._bound_deployment
    assert deployment.max_ongoing_requests == 4 + 10 + replicas.SPARE_REQUESTS
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    assert deployment._deployment_config.autoscaling_config.target_ongoing_requests == 4
    assert deployment.ray_actor_options["runtime_env"]["env_vars"]["QERVE_NUM_THREADS"] == "2"
