"""Catalogue, document and exposition name the same metrics, with the same types and labels, whatever clients send."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.llama.device_memory import DeviceMemory
from service import memory
from service.gpu import read_device_memory
from service.metrics import CATALOGUE
from service.metrics.catalogue import FINISH_REASONS, REJECTIONS
from service.metrics.vllm_names import VLLM_NAMES
from tests.support.api_server import live_server

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = [line for line in DOCUMENT.splitlines() if re.match(r"\| `(qerve|process)_", line)]
STANDARD = "process_"
PROMPT = "hello " * 8

# What vLLM's example dashboard, llm-d's endpoint picker and KEDA's scaler for vLLM ask for, as of vLLM 0.32.
READ_BY_OTHERS = {
    "vllm:e2e_request_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket", "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count", "vllm:num_requests_running", "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count", "vllm:kv_cache_usage_perc", "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket", "vllm:request_success_total", "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum", "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum", "vllm:cache_config_info", "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total", "vllm:num_preemptions_total",
}  # fmt: skip


def families_of(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def exposed():
    """What a server exposes that has done something of everything, has a GPU and a container, and speaks vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cuda_memory", lambda: {(0, "allocated"): 1})
        patch.setattr(memory, "cgroup_memory", lambda *_: {"current": 1, "max": 2})
        with live_server(metrics_compat="vllm", speculative_tokens=4, prefix_caching=True) as server:
            repeated = {"prompt": "abcabcabcabcabc" * 3, "max_tokens": 20, "temperature": 0}
            assert server.post("/v1/completions", json=repeated).status_code == 200
            assert server.post("/v1/perplexity", json={"text": "hello world"}).status_code == 200
            server.context.metrics.draft_checked(2, 1)
            read_device_memory(server.context.metrics.read, DeviceMemory(1, 1, 1, 1, 1))
            yield server.get("/metrics").text


def test_every_metric_of_the_catalogue_is_exposed_with_its_type_and_labels(exposed):
    families = families_of(exposed)
    for instrument in CATALOGUE.values():
        name = instrument.exposed_name.removesuffix("_total") if instrument.kind == "counter" else None
        family = families[name or instrument.exposed_name]
        assert family.type == instrument.kind, instrument.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(instrument.label_names), sample.name


def test_nothing_else_of_ours_is_exposed(exposed):
    known = {instrument.exposed_name for instrument in CATALOGUE.values()}
    for name, family in families_of(exposed).items():
        total = f"{name}_total" if family.type == "counter" else name
        if not name.endswith("_created") and name.startswith("qerve_"):
            assert total in known


def test_the_document_says_what_the_catalogue_says():
    documented = {}
    for row in ROWS:
        name, kind, labels = (cell.strip() for cell in row.strip("|").split(" | ")[:3])
        documented[name.strip("` ")] = kind, [label.strip("` ") for label in labels.split(",") if label.strip()]
    ours = {name: found for name, found in documented.items() if not name.startswith(STANDARD)}
    assert ours == {
        instrument.exposed_name: (instrument.kind, [*(["M"] if instrument.is_model else []), *instrument.labels])
        for instrument in CATALOGUE.values()
    }


@pytest.mark.parametrize("words", [REJECTIONS, FINISH_REASONS])
def test_the_document_explains_every_word_that_a_label_may_be(words):
    assert all(f"`{word}`" in DOCUMENT for word in words)


def test_tools_that_read_vllms_names_find_them(exposed):
    found = {line.split("{")[0] for line in exposed.splitlines() if line.startswith("vllm:")}
    assert READ_BY_OTHERS - found == set()
    assert set(VLLM_NAMES) <= set(CATALOGUE)


def test_under_vllms_names_there_are_our_values(exposed):
    """Line by line: but for its prefix, each is one of ours."""
    samples = {line for line in exposed.splitlines() if not line.startswith("#")}
    theirs = {line for line in samples if line.startswith("vllm:")}
    assert len(theirs) > 200
    assert {line.replace("vllm:", "qerve_", 1) for line in theirs} <= samples


def test_vllms_names_are_not_there_unless_asked_for():
    with live_server() as server:
        assert "vllm:" not in server.get("/metrics").text


def test_whatever_clients_send_there_are_no_more_series():
    with live_server(api_key=None) as server:

        def label_sets():
            return {
                (sample.name, *sorted(sample.labels.items()))
                for family in server.context.metrics.registry.collect()
                for sample in family.samples
            }

        def attack(word):
            server.get(f"/{word}")
            server.get(f"/v1/models/{word}")
            server.client.request(word.upper(), "/v1/completions")
            server.post(f"/v1/{word}", json={"model": word})
            server.post("/v1/completions", json={"model": word, "prompt": word, "max_tokens": 2})
            server.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "user": word, "stop": [word]})
            server.post("/v1/chat/completions", json={"model": word, "messages": [{"role": word, "content": word}]})
            server.post("/v1/perplexity", json={"text": word, "model": word})
            server.get(
                "/metrics", headers={"x-request-id": word, "user-agent": word, "authorization": f"Bearer {word}"}
            )

        attack("first")
        before = label_sets()
        for number in range(5):
            attack(f"hostile{chr(97 + number)}word")
        after = label_sets()
        assert after == before
        assert "hostile" not in server.get("/metrics").text
        statuses = {dict(labels).get("status") for name, *labels in after if name == "qerve_http_requests_total"}
        assert {"200", "400", "404"} <= statuses  # the attacks did reach what counts them
