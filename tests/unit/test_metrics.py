"""Metric names, labels and values, against vLLM's bucket lists and what really happened."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service import metrics as names
from service.engine.request import FinishReason, Request, SamplingParams
from service.metrics import Metrics, length_buckets

# As vLLM 0.32 declares them.
VLLM_TTFT = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
]
VLLM_ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
VLLM_E2E = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def metrics():
    return Metrics("m", 256)


def samples(metrics):
    """(name, labels) -> value, from the text a scraper gets."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics, name, **labels):
    return samples(metrics).get((name, tuple(sorted({**LABELS, **labels}.items()))))


def finished_request(**times):
    request = Request("r", [1] * 10, SamplingParams(max_tokens=8), arrival_seconds=100.0)
    request.output_token_ids = [1, 2, 3]
    request.finish_reason = FinishReason.STOP
    defaults = {"scheduled_seconds": 101.0, "first_token_seconds": 103.0, "finished_seconds": 107.0}
    for name, seconds in {**defaults, **times}.items():
        setattr(request, name, seconds)
    return request


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(names.TTFT_BUCKETS, VLLM_TTFT), (names.TOKEN_BUCKETS, VLLM_ITL), (names.REQUEST_BUCKETS, VLLM_E2E)],
)
def test_bucket_lists_contain_vllms_and_are_sorted(ours, theirs):
    assert set(theirs) <= set(ours)
    assert list(ours) == sorted(set(ours))


def test_length_buckets_go_up_to_the_longest_sequence():
    assert length_buckets(256) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert length_buckets(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_every_instrument_is_there_before_anything_happened(metrics):
    present = {name for name, _ in samples(metrics)}
    counters = ("prompt_tokens", "generation_tokens", "client_disconnects", "perplexity_requests", "perplexity_tokens")
    histograms = (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_time_per_output_token_seconds", "request_params_n", "request_params_max_tokens",
        "iteration_tokens_total",
    )  # fmt: skip
    assert {f"qerve_{name}_total" for name in (*counters, "nonfinite_logits")} <= present
    assert {f"qerve_{name}_bucket" for name in histograms} <= present
    assert "process_resident_memory_bytes" in present


def test_a_finished_request_is_split_into_queue_prefill_and_decode(metrics):
    metrics.request_finished(finished_request())
    seconds = {"e2e_request_latency": 7, "request_queue_time": 1, "request_inference_time": 6}
    seconds |= {"request_prefill_time": 2, "request_decode_time": 4, "request_time_per_output_token": 2}
    for name, expected in seconds.items():
        assert value(metrics, f"qerve_{name}_seconds_sum") == pytest.approx(expected), name
        assert value(metrics, f"qerve_{name}_seconds_count") == 1, name
    assert value(metrics, "qerve_request_prompt_tokens_sum") == 10
    assert value(metrics, "qerve_request_generation_tokens_sum") == 3
    assert value(metrics, "qerve_request_params_max_tokens_sum") == 8
    assert value(metrics, "qerve_request_success_total", finished_reason="stop") == 1


def test_a_request_aborted_in_the_queue_has_no_inference_time(metrics):
    metrics.request_finished(finished_request(scheduled_seconds=None, first_token_seconds=None))
    assert value(metrics, "qerve_e2e_request_latency_seconds_count") == 1
    assert value(metrics, "qerve_request_queue_time_seconds_count") == 0


def test_the_first_token_counts_the_prompt_and_the_others_their_distance(metrics):
    request = finished_request()
    for previous, now in ((None, 103.0), (103.0, 103.5)):
        request.last_token_seconds = now
        metrics.token_generated(request, previous)
    assert value(metrics, "qerve_prompt_tokens_total") == 10
    assert value(metrics, "qerve_generation_tokens_total") == 2
    assert value(metrics, "qerve_time_to_first_token_seconds_sum") == pytest.approx(3.0)
    assert value(metrics, "qerve_inter_token_latency_seconds_sum") == pytest.approx(0.5)


def test_events_are_counted_with_their_labels(metrics):
    metrics.rejected("queue_full")
    metrics.client_disconnected()
    metrics.perplexity_scored(1023)
    metrics.logits_not_finite()
    metrics.step_ran(40)
    metrics.request_accepted(2)
    assert value(metrics, "qerve_requests_rejected_total", reason="queue_full") == 1
    assert value(metrics, "qerve_client_disconnects_total") == 1
    assert value(metrics, "qerve_perplexity_requests_total") == 1
    assert value(metrics, "qerve_perplexity_tokens_total") == 1023
    assert value(metrics, "qerve_nonfinite_logits_total") == 1
    assert value(metrics, "qerve_iteration_tokens_total_sum") == 40
    assert value(metrics, "qerve_request_params_n_sum") == 2


def test_present_values_are_read_at_every_scrape(metrics):
    numbers = iter([3, 5])
    metrics.read("num_requests_running", lambda: [({}, next(numbers))])
    assert value(metrics, "qerve_num_requests_running") == 3
    assert value(metrics, "qerve_num_requests_running") == 5


def test_a_reading_without_values_does_not_appear(metrics):
    metrics.read("canary_perplexity", list)
    assert not any(name.startswith("qerve_canary_perplexity") for name, _ in samples(metrics))


def test_two_applications_do_not_share_counts():
    first, second = Metrics("m", 16), Metrics("m", 16)
    first.client_disconnected()
    assert value(first, "qerve_client_disconnects_total") == 1
    assert value(second, "qerve_client_disconnects_total") == 0
