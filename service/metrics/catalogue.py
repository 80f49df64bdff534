"""Every metric of the service in one list: name, type, labels, meaning; ``docs/metrics.md`` says the same.

Where vLLM has a metric, ours has its suffix, type, labels and meaning under the prefix ``qerve_``, and buckets that
contain its own. Label values are configured names, route templates and the fixed words below, never a client's text.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "qerve_"
MODEL_LABELS = ("model_name", "engine")

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
HTTP_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTHS: tuple[float, ...] = ()
"""Stands for ``length_buckets`` of the served model."""

REJECTIONS = ("queue_full", "kv_budget", "rate_limit", "too_long", "bad_grammar", "draining", "loading", "unauthorized")
FINISH_REASONS = ("stop", "length", "abort", "error")
PROMPT_SOURCES = ("local_compute", "local_cache_hit")
CANARY_RESULTS = ("ok", "out_of_tolerance", "failed", "aborted")


class Instrument(NamedTuple):
    """One metric, without its prefix (and a counter's ``_total``).

    labels:   beside ``MODEL_LABELS``, which all have that are about the served model
    values:   of its one label, where all are known: they are exposed from the start, as 0
    is_model: it is about the served model
    """

    name: str
    kind: Kind
    documentation: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    is_model: bool = True

    @property
    def label_names(self) -> tuple[str, ...]:
        """All of its labels."""
        return (*MODEL_LABELS, *self.labels) if self.is_model else self.labels

    @property
    def exposed_name(self) -> str:
        """Its name as Prometheus sees it, without what a histogram adds."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


def length_buckets(longest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, ... up to ``longest``."""
    steps = (digit * 10**exponent for exponent in range(len(str(longest))) for digit in (1, 2, 5))
    return [step for step in steps if step <= longest]


def _counter(name: str, documentation: str, label: str | None = None, values: Sequence[str] = ()) -> Instrument:
    return Instrument(name, "counter", documentation, () if label is None else (label,), tuple(values))


def _gauge(name: str, documentation: str, *labels: str) -> Instrument:
    return Instrument(name, "gauge", documentation, labels)


def _of_process(name: str, documentation: str, *labels: str) -> Instrument:
    return Instrument(name, "gauge", documentation, labels, is_model=False)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Instrument:
    return Instrument(name, "histogram", documentation, buckets=buckets)


REQUESTS = (
    _gauge("num_requests_running", "Sequences being generated"),
    _gauge("num_requests_waiting", "Sequences that wait for a seat or for cache blocks"),
    _gauge("num_requests_waiting_by_reason", "Of the queue: for capacity, or deferred before the engine", "reason"),
    _gauge("queue_depth", "Sequences that are admitted and do not run"),
    _gauge("queue_capacity", "Sequences that may be admitted beyond those that can run"),
    _gauge("num_queued_tokens", "Prompt tokens that wait"),
    _counter("request_success", "Sequences that ended, by reason", "finished_reason", FINISH_REASONS),
    _counter("requests_rejected", "Requests turned away, by reason", "reason", REJECTIONS),
    _counter("client_disconnects", "Clients that left before their answer was complete"),
    _counter("deadline_exceeded", "Requests that took longer than they may"),
    _counter("stalled_readers", "Streams cut off because their reader took nothing"),
    _counter("failed_steps", "Steps of the engine that ended in an exception"),
)
TOKENS = (
    _counter("prompt_tokens", "Prompt tokens, computed or taken from the prefix cache"),
    _counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache"),
    _counter("prompt_tokens_by_source", "Prompt tokens, by where they came from", "source", PROMPT_SOURCES),
    _counter("generation_tokens", "Tokens generated"),
    _counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache"),
    _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    _counter("num_preemptions", "Requests that gave way to earlier ones for a while"),
    _counter("spec_decode_num_drafts", "Drafts of next tokens that were checked"),
    _counter("spec_decode_num_draft_tokens", "Tokens of those drafts"),
    _counter("spec_decode_num_accepted_tokens", "Of those, tokens that were right"),
    _counter("spec_decode_num_accepted_tokens_per_pos", "The same, by place in the draft", "position"),
    _histogram("iteration_tokens_total", "Tokens of one engine step", ITERATION_BUCKETS),
    _gauge("throughput_tokens_per_second", "Speed of the last half minute or so of busy time, prompts included"),
)
LATENCY = (
    _histogram("time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS),
    _histogram("inter_token_latency_seconds", "Between two tokens of a sequence", TOKEN_BUCKETS),
    _histogram("request_time_per_output_token_seconds", "Mean of a sequence's inter-token latencies", TOKEN_BUCKETS),
    _histogram("e2e_request_latency_seconds", "From arrival to the last token", REQUEST_BUCKETS),
    _histogram("request_queue_time_seconds", "From arrival to the first step", REQUEST_BUCKETS),
    _histogram("request_inference_time_seconds", "From the first step to the last token", REQUEST_BUCKETS),
    _histogram("request_prefill_time_seconds", "From the first step to the first token", REQUEST_BUCKETS),
    _histogram("request_decode_time_seconds", "From the first to the last token", REQUEST_BUCKETS),
    _histogram("request_prompt_tokens", "Prompt tokens of a sequence", LENGTHS),
    _histogram("request_prefill_kv_computed_tokens", "Of those, tokens that the cache did not have", LENGTHS),
    _histogram("request_generation_tokens", "Tokens that a sequence got", LENGTHS),
    _histogram("request_max_num_generation_tokens", "Tokens of the longest output of a call", LENGTHS),
    _histogram("request_params_max_tokens", "Tokens that a sequence may get", LENGTHS),
    _histogram("request_params_n", "Choices that a call asks for", (1, 2, 5, 10, 20)),
)
HTTP = (
    Instrument("http_requests", "counter", "Responses", ("method", "path", "status"), is_model=False),
    Instrument(
        "http_request_duration_seconds", "histogram", "From a request to its response's last byte", ("method", "path"),
        buckets=HTTP_BUCKETS, is_model=False,
    ),
)  # fmt: skip
CACHE = (
    _gauge("kv_cache_usage_perc", "Share of the key-value cache that requests hold, 0 to 1"),
    _gauge("kv_cache_bytes", "Key-value cache, by kind: capacity, used, cached, reserved", "kind"),
    _gauge(
        "cache_config_info", "How the key-value cache is set up, in labels; always 1",
        "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching",
    ),
)  # fmt: skip
MEMORY = (
    _of_process("process_memory_bytes", "Memory of this process: rss_anon, rss_file, rss_shmem, pss, peak", "kind"),
    _of_process("memory_component_bytes", "Resident memory of this process by what it is for", "component"),
    _of_process("cgroup_memory_bytes", "Memory of this process's control group: current, max, peak", "kind"),
    _of_process("oom_headroom_bytes", "What can still be taken before the machine or the control group is full"),
    _of_process(
        "cuda_memory_bytes", "Memory of each CUDA device: allocated, reserved, max_allocated, free, total",
        "device", "kind",
    ),
)  # fmt: skip
MODEL = (
    _gauge("ready", "1 while /health/ready says so"),
    _gauge(
        "build_info", "What is served and how, in labels; always 1",
        "version", "git_sha", "kernel", "artifact_sha256", "method", "scheme", "rank",
    ),
    _gauge("model_weight_bytes", "Weights as stored in the artifact, by component", "component"),
    _gauge("model_resident_bytes", "Weights as kept in memory, by backend or component", "backend"),
    _gauge("model_effective_bits_per_weight", "Stored bits per weight of the linear layers"),
    _gauge("model_load_seconds", "From opening the artifact to the network built"),
    _gauge("startup_seconds", "Time from the process's start to ready, by phase", "phase"),
    _gauge("elastic_rank", "Rank that new requests get now"),
    _gauge("elastic_rank_full", "Rank of the artifact"),
    _counter("rank_shed_requests", "Sequences that got less rank because many waited"),
)  # fmt: skip
QUALITY = (
    _counter("perplexity_requests", "Perplexity requests answered"),
    _counter("perplexity_tokens", "Tokens scored by perplexity requests"),
    _counter("nonfinite_logits", "Rows of logits that held NaN or infinity"),
    _gauge("canary_ok", "1 while the perplexity of the artifact's probe is within its tolerance"),
    _gauge("canary_perplexity", "Of the artifact's probe, as served, when it was last scored"),
    _gauge("canary_expected_perplexity", "The same as the build measured it"),
    _gauge("canary_tolerance", "How far the one may be from the other, relative"),
    _gauge("canary_timestamp_seconds", "When the probe was last scored, in Unix time"),
    _gauge("canary_duration_seconds", "How long that took"),
    _counter("canary_checks", "Attempts to score the probe, by how they ended", "result", CANARY_RESULTS),
)
CATALOGUE = {
    instrument.name: instrument
    for group in (REQUESTS, TOKENS, LATENCY, HTTP, CACHE, MEMORY, MODEL, QUALITY)
    for instrument in group
}
"""Name -> metric."""
