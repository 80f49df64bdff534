"""Prometheus metrics: vLLM's names with our prefix, its labels, and bucket lists that contain its own.

One registry per application. What has a present value (queue, cache, memory) is read when it is scraped; what happens
(tokens, latencies, responses) is counted when it happens. Label values are configured names, route templates and fixed
words, never a client's text.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from . import memory
from .engine.engine import EngineObserver
from .engine.request import Request

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
WEIGHT_COMPONENTS = {"lora_down": "lowrank_a", "lora_up": "lowrank_b"}
"""Manifest component -> label value: x passes through A (down) first, then B (up), as LoRA calls them."""

Reading = tuple[dict[str, str], float]


def length_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``longest``."""
    steps = (digit * 10**exponent for exponent in range(len(str(longest))) for digit in (1, 2, 5))
    return [step for step in steps if step <= longest]


class Readings(Collector):
    """A gauge whose values are read when it is scraped; with nothing to read it does not appear."""

    def __init__(self, name: str, documentation: str, read: Callable[[], Sequence[Reading]]) -> None:
        self._name = name
        self._documentation = documentation
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The present values."""
        readings = self._read()
        if readings:
            family = GaugeMetricFamily(self._name, self._documentation)
            for labels, value in readings:
                family.add_sample(self._name, labels, value)
            yield family


class Metrics(EngineObserver):
    """Every instrument of one application, and the engine's observer.

    registry: all of them
    exposed:  what ``/metrics`` shows; the registry, unless something gathers it from several processes
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self.exposed = self.registry
        self._labels = {"model_name": model_name, "engine": "0"}
        self._add_counters()
        self._add_histograms(max_model_len)
        self._add_http()
        ProcessCollector(registry=self.registry)
        self.add_readings("process_memory_bytes", "Memory of this process by kind", _process_memory)
        self.add_readings("cgroup_memory_bytes", "Memory of this process's control group", _cgroup_memory)
        self.add_readings("cuda_memory_bytes", "Memory of each CUDA device", _cuda_memory)

    def add_readings(self, name: str, documentation: str, read: Callable[[], Sequence[Reading]]) -> None:
        """A gauge ``qerve_NAME`` that ``read`` is asked for at every scrape."""
        self.registry.register(Readings(f"qerve_{name}", documentation, read))

    def add_value(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge ``qerve_NAME`` of the served model, read at every scrape."""
        self.add_group(name, documentation, lambda: [({}, read())])

    def add_group(self, name: str, documentation: str, read: Callable[[], Sequence[Reading]]) -> None:
        """A gauge ``qerve_NAME`` of the served model with further labels, read at every scrape."""
        self.add_readings(
            name, documentation, lambda: [({**self._labels, **labels}, value) for labels, value in read()]
        )

    def add_constants(self, name: str, documentation: str, readings: Sequence[Reading]) -> None:
        """A gauge ``qerve_NAME`` of the served model that never changes."""
        self.add_group(name, documentation, lambda: readings)

    def rejected(self, reason: str, count: int = 1) -> None:
        """A request was turned away, or ``count`` of them."""
        self._rejected.labels(**self._labels, reason=reason).inc(count)

    def deadline_exceeded(self) -> None:
        """A request took longer than it may."""
        self._deadlines.inc()

    def reader_stalled(self) -> None:
        """A stream was cut off because its reader took nothing."""
        self._stalls.inc()

    def client_disconnected(self) -> None:
        """A client left before its answer was complete."""
        self._disconnects.inc()

    def request_accepted(self, num_choices: int) -> None:
        """A call for ``num_choices`` outputs per prompt was admitted."""
        self._params_n.observe(num_choices)

    def rank_shed(self, num_sequences: int) -> None:
        """So many new sequences get less of the corrections because many others wait."""
        self._rank_shed.inc(num_sequences)

    def perplexity_scored(self, num_tokens: int) -> None:
        """A perplexity request is answered."""
        self._perplexity_requests.inc()
        self._perplexity_tokens.inc(num_tokens)

    def http_finished(self, method: str, path: str, status: int, seconds: float) -> None:
        """A response is complete; ``path`` is the route's template."""
        self._http_requests.labels(method=method, path=path, status=str(status)).inc()
        self._http_seconds.labels(method=method, path=path).observe(seconds)

    def request_started(self, request: Request) -> None:
        """See ``EngineObserver``."""
        self._prefix_queries.inc(request.num_prompt_tokens)
        self._prefix_hits.inc(request.num_cached_tokens)
        self._prompt_tokens_cached.inc(request.num_cached_tokens)

    def request_preempted(self, request: Request) -> None:
        """See ``EngineObserver``."""
        self._preemptions.inc()

    def step_ran(self, num_tokens: int) -> None:
        """See ``EngineObserver``."""
        self._iteration_tokens.observe(num_tokens)

    def token_generated(self, request: Request, previous_seconds: float | None) -> None:
        """See ``EngineObserver``."""
        now = request.last_token_seconds or 0.0
        self._generation_tokens.inc()
        if previous_seconds is None:
            self._prompt_tokens.inc(request.num_prompt_tokens)
            self._ttft.observe(now - request.arrival_seconds)
        else:
            self._inter_token.observe(now - previous_seconds)

    def request_finished(self, request: Request) -> None:
        """See ``EngineObserver``."""
        if request.params.max_tokens == 0:  # only computed and scored: a window of some other request, or all prompt
            self._prompt_tokens.inc(request.num_computed_tokens)
            return
        self._success.labels(**self._labels, finished_reason=str(request.finish_reason)).inc()
        finished, first = request.finished_seconds or 0.0, request.first_token_seconds
        self._e2e.observe(finished - request.arrival_seconds)
        self._request_prompt_tokens.observe(request.num_prompt_tokens)
        self._request_generation_tokens.observe(request.num_output_tokens)
        self._params_max_tokens.observe(request.params.max_tokens)
        scheduled = request.scheduled_seconds
        if scheduled is None or first is None:
            return
        self._queue_time.observe(scheduled - request.arrival_seconds)
        self._inference_time.observe(finished - scheduled)
        self._prefill_time.observe(first - scheduled)
        self._decode_time.observe(finished - first)
        if request.num_output_tokens > 1:
            per_token = (finished - first) / (request.num_output_tokens - 1)
            self._time_per_token.observe(per_token)

    def draft_checked(self, num_tokens: int, num_accepted: int) -> None:
        """See ``EngineObserver``."""
        self._drafts.inc()
        self._draft_tokens.inc(num_tokens)
        self._accepted_tokens.inc(num_accepted)

    def logits_not_finite(self) -> None:
        """See ``EngineObserver``."""
        self._nonfinite.inc()

    def _add_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, computed or taken from the prefix cache")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._drafts = self._counter("spec_decode_num_drafts", "Drafts of next tokens that were checked")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens of those drafts")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Of those, tokens that were right")
        self._preemptions = self._counter("num_preemptions", "Requests that gave way to earlier ones for a while")
        self._success = self._counter("request_success", "Requests that ended, by reason", "finished_reason")
        self._rejected = self._counter("requests_rejected", "Requests turned away, by reason", "reason")
        self._disconnects = self._counter("client_disconnects", "Clients that left before their answer was complete")
        self._rank_shed = self._counter("rank_shed_requests", "Sequences that got less rank because many waited")
        self._deadlines = self._counter("deadline_exceeded", "Requests that took longer than they may")
        self._stalls = self._counter("stalled_readers", "Streams cut off because their reader took nothing")
        self._perplexity_requests = self._counter("perplexity_requests", "Perplexity requests answered")
        self._perplexity_tokens = self._counter("perplexity_tokens", "Tokens scored by perplexity requests")
        self._nonfinite = self._counter("nonfinite_logits", "Rows of logits that held NaN or infinity")

    def _add_histograms(self, max_model_len: int) -> None:
        lengths = length_buckets(max_model_len)
        make = self._histogram
        self._ttft = make("time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS)
        self._inter_token = make("inter_token_latency_seconds", "Between two tokens of a request", TOKEN_BUCKETS)
        self._time_per_token = make(
            "request_time_per_output_token_seconds", "Mean of a request's inter-token latencies", TOKEN_BUCKETS
        )
        self._e2e = make("e2e_request_latency_seconds", "From arrival to the last token", REQUEST_BUCKETS)
        self._queue_time = make("request_queue_time_seconds", "From arrival to the first step", REQUEST_BUCKETS)
        self._inference_time = make("request_inference_time_seconds", "From first step to last token", REQUEST_BUCKETS)
        self._prefill_time = make("request_prefill_time_seconds", "From first step to first token", REQUEST_BUCKETS)
        self._decode_time = make("request_decode_time_seconds", "From first to last token", REQUEST_BUCKETS)
        self._request_prompt_tokens = make("request_prompt_tokens", "Prompt tokens of a request", lengths)
        self._request_generation_tokens = make("request_generation_tokens", "Tokens a request got", lengths)
        self._params_max_tokens = make("request_params_max_tokens", "Tokens a request may get", lengths)
        self._params_n = make("request_params_n", "Choices a call asks for", (1, 2, 5, 10, 20))
        self._iteration_tokens = make("iteration_tokens_total", "Tokens of one engine step", ITERATION_BUCKETS)

    def _add_http(self) -> None:
        labels, registry = ["method", "path"], self.registry
        self._http_requests = Counter("qerve_http_requests", "HTTP responses", [*labels, "status"], registry=registry)
        self._http_seconds = Histogram(
            "qerve_http_request_duration_seconds", "From request to the response's last byte", labels,
            registry=registry, buckets=HTTP_BUCKETS,
        )  # fmt: skip

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        """Without further ``labels``, the model's own: looking it up by its labels costs more than counting."""
        counter = Counter(f"qerve_{name}", documentation, [*self._labels, *labels], registry=self.registry)
        return counter if labels else counter.labels(**self._labels)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"qerve_{name}", documentation, list(self._labels), registry=self.registry, buckets=buckets
        )
        return histogram.labels(**self._labels)


def _process_memory() -> list[Reading]:
    return [({"kind": kind}, size) for kind, size in memory.process_memory().items()]


def _cgroup_memory() -> list[Reading]:
    return [({"kind": kind}, size) for kind, size in memory.cgroup_memory().items()]


def _cuda_memory() -> list[Reading]:
    return [({"device": str(device), "kind": kind}, size) for (device, kind), size in memory.cuda_memory().items()]
