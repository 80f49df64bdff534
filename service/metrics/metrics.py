"""What happens, as numbers: every event of the engine and the API counted by its instrument."""

from prometheus_client import CollectorRegistry, ProcessCollector

from ..engine.engine import EngineObserver
from ..engine.request import Request
from .readings import read_process
from .registry import Instruments, Read


class Metrics(EngineObserver):
    """Every instrument of one application, and the engine's observer.

    What has a present value (queue, cache, memory) is read when it is scraped, see ``read``; what happens (tokens,
    latencies, responses) is counted when it happens.

    registry:   where all of them are
    phases:     what the time from the process's start to ready was spent on, in seconds
    """

    def __init__(self, model_name: str, max_model_len: int, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.phases: dict[str, float] = {}
        self._instruments = Instruments(self.registry, model_name, max_model_len)
        self._add_requests()
        self._add_tokens()
        self._add_latencies()
        self._add_http()
        self.read("startup_seconds", lambda: [({"phase": phase}, seconds) for phase, seconds in self.phases.items()])
        ProcessCollector(registry=self.registry)
        read_process(self.read)

    def read(self, name: str, read: Read) -> None:
        """The catalogue's gauge ``name``: ``read`` gives its labels and values at every scrape."""
        self._instruments.read(name, read)

    def export_vllm_names(self) -> None:
        """Offer what other tools read under vLLM's names as well."""
        self._instruments.export_vllm_names()

    def rejected(self, reason: str, count: int = 1) -> None:
        """A request was turned away, or ``count`` of them."""
        self._rejected.inc(reason, count)

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

    def call_finished(self, num_tokens: int) -> None:
        """A call is over whose longest output has ``num_tokens``."""
        self._max_generation_tokens.observe(num_tokens)

    def rank_shed(self, num_sequences: int) -> None:
        """So many new sequences get less of the corrections because many others wait."""
        self._rank_shed.inc(num_sequences)

    def perplexity_scored(self, num_tokens: int) -> None:
        """A perplexity request is answered."""
        self._perplexity_requests.inc()
        self._perplexity_tokens.inc(num_tokens)

    def canary_checked(self, result: str) -> None:
        """An attempt to score the artifact's probe ended as ``result`` says."""
        self._canary_checks.inc(result)

    def http_finished(self, method: str, path: str, status: int, seconds: float) -> None:
        """A response is complete; ``path`` is the route's template."""
        self._http_requests.labels(method=method, path=path, status=str(status)).inc()
        self._http_seconds.labels(method=method, path=path).observe(seconds)

    def request_started(self, request: Request) -> None:
        """See ``EngineObserver``."""
        self._prefix_queries.inc(request.num_prompt_tokens)
        self._prefix_hits.inc(request.num_cached_tokens)

    def request_preempted(self, request: Request) -> None:
        """See ``EngineObserver``."""
        self._preemptions.inc()

    def step_ran(self, num_tokens: int) -> None:
        """See ``EngineObserver``."""
        self._iteration_tokens.observe(num_tokens)

    def step_failed(self) -> None:
        """See ``EngineObserver``."""
        self._failed_steps.inc()

    def token_generated(self, request: Request, previous_seconds: float | None) -> None:
        """See ``EngineObserver``."""
        now = request.last_token_seconds or 0.0
        self._generation_tokens.inc()
        if previous_seconds is None:
            self._count_prompt(request.num_prompt_tokens, request.num_cached_tokens)
            self._ttft.observe(now - request.arrival_seconds)
        else:
            self._inter_token.observe(now - previous_seconds)

    def request_finished(self, request: Request) -> None:
        """See ``EngineObserver``."""
        if request.params.max_tokens == 0:  # only computed and scored: a window of some other request, or all prompt
            self._count_prompt(request.num_computed_tokens, request.num_cached_tokens)
            return
        self._success.inc(str(request.finish_reason))
        finished, first = request.finished_seconds or 0.0, request.first_token_seconds
        self._e2e.observe(finished - request.arrival_seconds)
        self._request_prompt_tokens.observe(request.num_prompt_tokens)
        self._request_generation_tokens.observe(request.num_output_tokens)
        self._params_max_tokens.observe(request.params.max_tokens)
        scheduled = request.scheduled_seconds
        if scheduled is None or first is None:
            return
        self._request_computed_tokens.observe(request.num_prompt_tokens - request.num_cached_tokens)
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
        for position in range(num_accepted):
            self._accepted_by_position.inc(str(position))

    def logits_not_finite(self) -> None:
        """See ``EngineObserver``."""
        self._nonfinite.inc()

    def _count_prompt(self, num_tokens: int, num_cached: int) -> None:
        num_cached = min(num_cached, num_tokens)  # aborted before anything ran, nothing counts
        self._prompt_tokens.inc(num_tokens)
        self._prompt_tokens_cached.inc(num_cached)
        self._prompt_sources.inc("local_cache_hit", num_cached)
        self._prompt_sources.inc("local_compute", num_tokens - num_cached)

    def _add_requests(self) -> None:
        count, by_label = self._instruments.counter, self._instruments.counters
        self._success = by_label("request_success")
        self._rejected = by_label("requests_rejected")
        self._disconnects = count("client_disconnects")
        self._deadlines = count("deadline_exceeded")
        self._stalls = count("stalled_readers")
        self._failed_steps = count("failed_steps")
        self._rank_shed = count("rank_shed_requests")
        self._perplexity_requests = count("perplexity_requests")
        self._perplexity_tokens = count("perplexity_tokens")
        self._nonfinite = count("nonfinite_logits")
        self._canary_checks = by_label("canary_checks")

    def _add_tokens(self) -> None:
        count, by_label = self._instruments.counter, self._instruments.counters
        self._prompt_tokens = count("prompt_tokens")
        self._prompt_tokens_cached = count("prompt_tokens_cached")
        self._prompt_sources = by_label("prompt_tokens_by_source")
        self._generation_tokens = count("generation_tokens")
        self._prefix_queries = count("prefix_cache_queries")
        self._prefix_hits = count("prefix_cache_hits")
        self._preemptions = count("num_preemptions")
        self._drafts = count("spec_decode_num_drafts")
        self._draft_tokens = count("spec_decode_num_draft_tokens")
        self._accepted_tokens = count("spec_decode_num_accepted_tokens")
        self._accepted_by_position = by_label("spec_decode_num_accepted_tokens_per_pos")

    def _add_latencies(self) -> None:
        make = self._instruments.histogram
        self._ttft = make("time_to_first_token_seconds")
        self._inter_token = make("inter_token_latency_seconds")
        self._time_per_token = make("request_time_per_output_token_seconds")
        self._e2e = make("e2e_request_latency_seconds")
        self._queue_time = make("request_queue_time_seconds")
        self._inference_time = make("request_inference_time_seconds")
        self._prefill_time = make("request_prefill_time_seconds")
        self._decode_time = make("request_decode_time_seconds")
        self._request_prompt_tokens = make("request_prompt_tokens")
        self._request_computed_tokens = make("request_prefill_kv_computed_tokens")
        self._request_generation_tokens = make("request_generation_tokens")
        self._max_generation_tokens = make("request_max_num_generation_tokens")
        self._params_max_tokens = make("request_params_max_tokens")
        self._params_n = make("request_params_n")
        self._iteration_tokens = make("iteration_tokens_total")

    def _add_http(self) -> None:
        self._http_requests = self._instruments.counter("http_requests")
        self._http_seconds = self._instruments.histogram("http_request_duration_seconds")
