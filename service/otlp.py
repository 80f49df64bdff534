"""OpenTelemetry: a span per request and the ``gen_ai.server.*`` metrics, sent to a collector (extra ``otlp``).

Names and buckets are those of the semantic conventions for generative AI; ``gen_ai.latency.*`` are vLLM's. A span is
made when its request is over, from what the server has noted by then, and never holds text. Threads send: spans that a
collector does not take in time are dropped, requests do not notice.
"""

import os
import threading
import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from models.artifact.format import qerve_version

from .request_record import RequestRecord

FROM_ENVIRONMENT = "env"
"""As endpoint: the collector, its protocol's options and the sampler are what ``OTEL_*`` variables say."""
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/perplexity": "perplexity",
}
"""Route -> ``gen_ai.operation.name``; requests to other routes have no span."""
DURATION_BUCKETS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_SEND_SECONDS = 5.0
_METRICS_EVERY_SECONDS = 15.0
_NS = 1_000_000_000

Attributes = dict[str, str | int | float | tuple[str, ...]]


class OtlpTelemetry:
    """Tells a collector about every request that is over.

    model_name: the configured one
    address:    host and port that clients reach
    """

    def __init__(
        self,
        model_name: str,
        address: tuple[str, int],
        span_exporter: SpanExporter,
        metric_reader: MetricReader,
        *,
        is_from_environment: bool = False,
    ) -> None:
        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "qerve"), "service.version": qerve_version()}
        resource = Resource.create(service)
        sampler = None if is_from_environment else DEFAULT_ON
        self._spans = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._spans.add_span_processor(BatchSpanProcessor(span_exporter))
        self._metrics = MeterProvider([metric_reader], resource, shutdown_on_exit=False)
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = self._spans.get_tracer("qerve", qerve_version())
        self._common: Attributes = {
            "gen_ai.provider.name": "qerve",
            "gen_ai.request.model": model_name,
            "gen_ai.response.model": model_name,
            "server.address": address[0],
            "server.port": address[1],
        }
        self._add_histograms()

    def _add_histograms(self) -> None:
        make = self._metrics.get_meter("qerve", qerve_version()).create_histogram
        self._duration = make(
            "gen_ai.server.request.duration", "s", "From a request to its last byte",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        )  # fmt: skip
        self._ttft = make(
            "gen_ai.server.time_to_first_token", "s", "From a request's arrival to its first token",
            explicit_bucket_boundaries_advisory=TTFT_BUCKETS,
        )  # fmt: skip
        self._time_per_token = make(
            "gen_ai.server.time_per_output_token", "s", "Between two tokens of an output, mean of a request",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        )  # fmt: skip

    def request_finished(
        self, record: RequestRecord, headers: Mapping[str, str], method: str, route: str, status: int
    ) -> None:
        """A response is complete; ``route`` is a template, ``headers`` are the request's."""
        operation = OPERATIONS.get(route)
        if operation is None:
            return
        seconds = time.monotonic() - record.started_seconds
        labels = self._common | {"gen_ai.operation.name": operation}
        error = _error_type(record, status)
        if error is not None:
            labels["error.type"] = error
        self._measure(record, labels, seconds)
        now = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {self._common['gen_ai.request.model']}",
            self._propagator.extract({name: headers.get(name, "") for name in ("traceparent", "tracestate")}),
            SpanKind.SERVER,
            labels | _http_attributes(record, method, route, status) | _call_attributes(record, seconds),
            start_time=now - int(seconds * _NS),
        )
        if error is not None and (status >= 500 or status == 200):
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)

    def _measure(self, record: RequestRecord, labels: Attributes, seconds: float) -> None:
        self._duration.record(seconds, labels)
        call = record.generation
        if call is None or call.first_output_seconds is None:
            return
        self._ttft.record(call.first_output_seconds - call.arrival_seconds, labels)
        if call.longest_output > 1:
            writing = call.last_output_seconds - call.first_output_seconds
            self._time_per_token.record(writing / (call.longest_output - 1), labels)

    def close(self, patience_seconds: float = _SEND_SECONDS) -> None:
        """Send what is left, as far as that goes within ``patience_seconds``; from then on nothing is taken."""
        senders = [threading.Thread(target=it.shutdown, daemon=True) for it in (self._spans, self._metrics)]
        until = time.monotonic() + patience_seconds
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(max(0.0, until - time.monotonic()))


def open_otlp(endpoint: str, model_name: str, address: tuple[str, int]) -> OtlpTelemetry:
    """Telemetry to the collector at ``endpoint`` (``http://HOST:4318``), or to ``env``'s."""
    is_from_environment = endpoint == FROM_ENVIRONMENT
    if is_from_environment:
        spans, metrics = OTLPSpanExporter(), OTLPMetricExporter()
        reader = PeriodicExportingMetricReader(metrics)
    else:
        base = endpoint.rstrip("/")
        spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=_SEND_SECONDS)
        metrics = OTLPMetricExporter(f"{base}/v1/metrics", timeout=_SEND_SECONDS)
        reader = PeriodicExportingMetricReader(metrics, export_interval_millis=1000 * _METRICS_EVERY_SECONDS)
    return OtlpTelemetry(model_name, address, spans, reader, is_from_environment=is_from_environment)


def _error_type(record: RequestRecord, status: int) -> str | None:
    """What went wrong, in one word; a stream that fails has begun with a 200."""
    call = record.generation
    if call is not None and call.is_expired:
        return "timeout"
    if call is not None and "error" in call.finish_reasons:
        return "engine_error"
    return str(status) if status >= 400 else None


def _http_attributes(record: RequestRecord, method: str, route: str, status: int) -> Attributes:
    return {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "qerve.request_id": record.request_id,
    }


def _call_attributes(record: RequestRecord, seconds: float) -> Attributes:
    call = record.generation
    if call is None:
        return {}
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": call.num_prompt_tokens,
        "gen_ai.usage.output_tokens": call.num_output_tokens,
        "gen_ai.latency.e2e": seconds,
    }
    if call.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = tuple(call.finish_reasons)
    if call.first_output_seconds is not None:
        attributes["gen_ai.latency.time_to_first_token"] = call.first_output_seconds - call.arrival_seconds
    sampling = call.sampling
    if sampling is not None:
        attributes |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
    return attributes
