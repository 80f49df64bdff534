"""What the Grafana dashboard shows: rows of panels of PromQL queries, as data. ``tools.dashboard`` writes the JSON."""

from dataclasses import dataclass
from typing import Literal

MODEL = 'model_name=~"$model_name", instance=~"$instance"'
PROCESS = 'instance=~"$instance"'
RATE = "[$__rate_interval]"

Kind = Literal["lines", "stacked", "state", "bars", "number", "table"]


@dataclass(frozen=True)
class Query:
    """PromQL, and what each of its series is called."""

    expression: str
    legend: str


@dataclass(frozen=True)
class View:
    """One panel.

    unit:        of Grafana's catalogue
    description: shown on hovering: what it means, and when to worry
    width:       of Grafana's 24 columns
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str
    width: int = 8
    kind: Kind = "lines"


def gauge(metric: str, legend: str, by: str = "", selector: str = MODEL) -> Query:
    """The sum over what is chosen above, split by the labels ``by``."""
    return Query(f"sum{_by(by)}({metric}{{{selector}}})", legend)


def worst(metric: str, legend: str, by: str = "instance", selector: str = MODEL, function: str = "max") -> Query:
    """The largest (``function`` min: the smallest) of what is chosen above, split by the labels ``by``."""
    return Query(f"{function}{_by(by)}({metric}{{{selector}}})", legend)


def rate(metric: str, legend: str, by: str = "", selector: str = MODEL) -> Query:
    """How much a counter grows per second."""
    return Query(f"sum{_by(by)}(rate({metric}{{{selector}}}{RATE}))", legend)


def ratio(part: str, whole: str, legend: str) -> Query:
    """The growth of one counter over that of another."""
    return Query(f"sum(rate({part}{{{MODEL}}}{RATE})) / sum(rate({whole}{{{MODEL}}}{RATE}))", legend)


def quantiles(histogram: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile."""
    buckets = f"sum by (le) (rate({histogram}_bucket{{{MODEL}}}{RATE}))"
    return tuple(Query(f"histogram_quantile(0.{digits}, {buckets})", f"p{digits}") for digits in ("50", "95", "99"))


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


TRAFFIC = (
    View(
        "Requests finished", "reqps",
        (rate("qerve_request_success_total", "{{finished_reason}}", "finished_reason"),
         rate("qerve_perplexity_requests_total", "perplexity")),
        "Per second, by what ended them; perplexity requests apart.",
    ),
    View(
        "Refused and lost", "reqps",
        (rate("qerve_requests_rejected_total", "refused: {{reason}}", "reason"),
         rate("qerve_client_disconnects_total", "client left"),
         rate("qerve_deadline_exceeded_total", "deadline missed"),
         rate("qerve_stalled_readers_total", "reader stalled")),
        "Per second. queue_full means that more comes in than can be served.",
    ),
    View(
        "Tokens per second", "short",
        (rate("qerve_prompt_tokens_total", "prompt"), rate("qerve_generation_tokens_total", "generated"),
         rate("qerve_prompt_tokens_cached_total", "prompt, from the prefix cache"),
         rate("qerve_perplexity_tokens_total", "scored")),
        "Prompt tokens read (those of perplexity requests too) and tokens generated.",
    ),
    View(
        "HTTP responses", "reqps", (rate("qerve_http_requests_total", "{{status}}", "status", PROCESS),),
        "Per second, by status. 500s are errors of the server: see its log.", width=24, kind="stacked",
    ),
)  # fmt: skip
LATENCY = (
    View(
        "Time to first token", "s", quantiles("qerve_time_to_first_token_seconds"),
        "From the arrival of a request to its first token, waiting included.",
    ),
    View(
        "Time between tokens", "s", quantiles("qerve_inter_token_latency_seconds"),
        "From one token of a request to its next: what a reader of a stream feels.",
    ),
    View(
        "Request duration", "s", quantiles("qerve_e2e_request_latency_seconds"),
        "From the arrival of a request to its last token.",
    ),
    View(
        "Time in the queue", "s", quantiles("qerve_request_queue_time_seconds"),
        "From the arrival of a request to its first step; rises before everything else when load grows.",
    ),
    View(
        "Time to read the prompt", "s", quantiles("qerve_request_prefill_time_seconds"),
        "From a request's first step to its first token.",
    ),
    View(
        "Time to generate", "s", quantiles("qerve_request_decode_time_seconds"),
        "From a request's first token to its last.",
    ),
)  # fmt: skip
SATURATION = (
    View(
        "Requests in the engine", "short",
        (gauge("qerve_num_requests_running", "running"), gauge("qerve_num_requests_waiting", "waiting"),
         gauge("qerve_queue_depth", "admitted, not running"), gauge("qerve_queue_capacity", "may wait")),
        "Running requests share every step; waiting ones have no place in it. Beyond what may wait they get 429.",
    ),
    View(
        "Key-value cache in use", "percentunit", (worst("qerve_kv_cache_usage_perc", "{{instance}}"),),
        "At 100 % requests wait or give way to earlier ones.",
    ),
    View(
        "Queued prompt tokens", "short", (gauge("qerve_num_queued_tokens", "waiting"),),
        "Prompt tokens that wait; with the speed they tell how long a new request waits.",
    ),
    View(
        "Tokens of a step", "short", quantiles("qerve_iteration_tokens_total"),
        "Near max_num_batched_tokens while prompts are read, else near the number of running requests.",
    ),
    View(
        "Preempted, shed, reused", "short",
        (rate("qerve_num_preemptions_total", "preempted per second"),
         rate("qerve_rank_shed_requests_total", "got less rank per second"),
         ratio("qerve_prefix_cache_hits_total", "qerve_prefix_cache_queries_total", "share of prompts reused")),
        "Preempted requests are computed again: give the cache more memory, or admit fewer sequences.",
    ),
    View(
        "Processor", "short",
        (Query(f"sum by (instance) (rate(process_cpu_seconds_total{{{PROCESS}}}{RATE}))", "{{instance}}"),),
        "Cores in use by the process.",
    ),
)  # fmt: skip
MEMORY = (
    View(
        "Process memory", "bytes",
        (gauge("process_resident_memory_bytes", "resident", selector=PROCESS),
         gauge("qerve_process_memory_bytes", "{{kind}}", "kind", PROCESS)),
        "rss_file is the mapped artifact: the kernel can drop it; rss_anon cannot be dropped.",
    ),
    View(
        "What memory is for", "bytes",
        (gauge("qerve_memory_component_bytes", "{{component}}", "component", PROCESS),),
        "Resident memory by its use; the stack should reach what is resident.", kind="stacked",
    ),
    View(
        "Memory left", "bytes",
        (worst("qerve_oom_headroom_bytes", "left, {{instance}}", selector=PROCESS, function="min"),
         worst("qerve_cgroup_memory_bytes", "{{kind}}", "kind", PROCESS)),
        "What the process may still take, and its control group. At nothing left the kernel ends the process.",
    ),
    View(
        "GPU memory", "bytes", (gauge("qerve_cuda_memory_bytes", "{{device}} {{kind}}", "device, kind", PROCESS),),
        "Of each device; empty on a processor.", width=12,
    ),
    View(
        "Key-value cache", "bytes", (gauge("qerve_kv_cache_bytes", "{{kind}}", "kind"),),
        "All of it, what requests hold, what is kept of former ones, and what running ones may still come to need.",
        width=12,
    ),
    View(
        "Weights by component", "bytes", (gauge("qerve_model_weight_bytes", "{{component}}", "component"),),
        "As stored in the artifact; lowrank_a and lowrank_b are the correction.", width=12, kind="bars",
    ),
    View(
        "Weights in memory", "bytes", (gauge("qerve_model_resident_bytes", "{{backend}}", "backend"),),
        "As kept by the kernels.", width=12, kind="bars",
    ),
)  # fmt: skip
QUALITY = (
    View(
        "Perplexity of the canary", "none",
        (worst("qerve_canary_perplexity", "{{instance}}"),
         worst("qerve_canary_expected_perplexity", "when it was built", ""),
         Query(f"max(qerve_canary_expected_perplexity{{{MODEL}}} * (1 + qerve_canary_tolerance{{{MODEL}}}))",
               "tolerated")),
        "Of the probe text in the artifact, scored again and again. If it moves, weights or kernels are broken.",
    ),
    View(
        "Ready", "short", (worst("qerve_ready", "{{instance}}", function="min"),),
        "1 while requests are taken. Not ready: loading, draining, failed, or the canary left its tolerance.",
        kind="state",
    ),
    View(
        "Logits that are not finite", "short", (rate("qerve_nonfinite_logits_total", "per second"),),
        "Rows with NaN or infinity; their requests fail. Anything but zero is an error.",
    ),
    View(
        "Rank of new requests", "short",
        (worst("qerve_elastic_rank", "{{instance}}", function="min"), worst("qerve_elastic_rank_full", "full", "")),
        "Less than the artifact's rank: the service sheds rank because many wait.",
    ),
    View(
        "Effective bits", "none", (worst("qerve_model_effective_bits_per_weight", "{{model_name}}", "model_name"),),
        "Stored bits per weight of the linear layers.", width=4, kind="number",
    ),
    View(
        "What runs", "none",
        (Query(f"max by (instance, model_name, version, kernel, scheme, rank, method) (qerve_build_info{{{MODEL}}})",
               "{{instance}}"),),
        "Version, kernels and scheme of each instance.", width=12, kind="table",
    ),
)  # fmt: skip

ROWS = (
    ("Traffic", TRAFFIC),
    ("Latency", LATENCY),
    ("Saturation", SATURATION),
    ("Memory", MEMORY),
    ("Quality", QUALITY),
)
