"""OpenTelemetry: spans and metrics in memory, then as a collector gets them over HTTP; nothing of any text."""

import builtins
import gzip
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from models.errors import QerveError
from service import app as app_module
from service.otlp import DURATION_BUCKETS, OtlpTelemetry
from tests.support.api_server import live_server, wait_until
from tests.support.fake_model import BrokenModel, FakeParts, Faults

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "find-me"}
BODY = {"prompt": "MARKERprompt", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


class Collector(ThreadingHTTPServer):
    """Keeps what is posted to it by path, decoded."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.received = {"/v1/traces": [], "/v1/metrics": []}
        self.raw = b""


class Handler(BaseHTTPRequestHandler):
    KINDS: ClassVar[dict[str, Any]] = {
        "/v1/traces": ExportTraceServiceRequest,
        "/v1/metrics": ExportMetricsServiceRequest,
    }

    def do_POST(self):
        data = self.rfile.read(int(self.headers["content-length"]))
        data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
        self.server.raw += data
        self.server.received[self.path].append(self.KINDS[self.path].FromString(data))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextmanager
def collector():
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def observed_server(monkeypatch, exporter, parts=None, **settings):
    """A server whose telemetry stays in memory, and its telemetry."""
    reader, made = InMemoryMetricReader(), []

    def make(_settings, info):
        made.append(OtlpTelemetry(info.name, ("host", 80), exporter, reader))
        return made[0]

    monkeypatch.setattr(app_module, "_telemetry", make)
    with live_server(parts, **settings) as server:
        yield server, made[0], reader


def wait_for_responses(server, num_responses):
    """Until they are accounted for, which is after the client has them."""
    wait_until(lambda: server.metric("qerve_http_requests_total") == num_responses)


def points_of(reader):
    """Metric name -> (sum, count, bounds, attributes) of its points."""
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    return {
        metric.name: [(p.sum, p.count, tuple(p.explicit_bounds), dict(p.attributes)) for p in metric.data.data_points]
        for metric in scope.metrics
    }


def test_a_request_is_one_span_of_the_callers_trace_and_has_no_text(monkeypatch):
    exporter = InMemorySpanExporter()
    with observed_server(monkeypatch, exporter) as (server, telemetry, _):
        before = time.time_ns()
        assert server.post("/v1/completions", json={**BODY, "stop": ["MARKERstop"]}, headers=HEADERS).status_code == 200
        server.get("/health/ready")
        server.get("/metrics")
        wait_for_responses(server, 3)
        telemetry._spans.force_flush()
        (span,) = exporter.get_finished_spans()
    assert (format(span.context.trace_id, "032x"), format(span.parent.span_id, "016x")) == (TRACE, PARENT)
    assert (span.name, span.kind.name) == ("text_completion fake", "SERVER")
    assert before <= span.start_time < span.end_time <= time.time_ns()
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "qerve",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "qerve.request_id": "find-me",
        "server.address": "host",
        "server.port": 80,
    }
    assert expected.items() <= dict(span.attributes).items()
    assert 0 < span.attributes["gen_ai.latency.time_to_first_token"] <= span.attributes["gen_ai.latency.e2e"]
    assert "MARKER" not in span.to_json()
    assert "error.type" not in span.attributes


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{TRACE}-{'0' * 16}-01", f"99-{TRACE}"])
def test_without_a_valid_parent_a_trace_begins(monkeypatch, header):
    exporter = InMemorySpanExporter()
    with observed_server(monkeypatch, exporter) as (server, telemetry, _):
        server.post("/v1/completions", json=BODY, headers={"traceparent": header})
        wait_for_responses(server, 1)
        telemetry._spans.force_flush()
        (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_durations_are_measured_by_operation_with_the_conventions_buckets(monkeypatch):
    with observed_server(monkeypatch, InMemorySpanExporter()) as (server, _, reader):
        server.post("/v1/completions", json=BODY)
        server.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 3})
        server.post("/v1/perplexity", json={"text": "some text"})
        server.post("/v1/completions", json={"prompt": ""})
        wait_for_responses(server, 4)
        points = points_of(reader)
    durations = points["gen_ai.server.request.duration"]
    found = {(p[3]["gen_ai.operation.name"], p[3].get("error.type")): p[1] for p in durations}
    assert found == {
        ("text_completion", None): 1, ("chat", None): 1, ("perplexity", None): 1, ("text_completion", "400"): 1,
    }  # fmt: skip
    assert all(point[2] == DURATION_BUCKETS for point in durations)
    assert sum(point[1] for point in points["gen_ai.server.time_to_first_token"]) == 2
    assert sum(point[1] for point in points["gen_ai.server.time_per_output_token"]) == 2


def test_a_stream_that_fails_is_an_error_although_its_status_is_200(monkeypatch):
    exporter = InMemorySpanExporter()
    parts = FakeParts(BrokenModel(faults=Faults(nan_on=ord("#"))))
    with observed_server(monkeypatch, exporter, parts) as (server, telemetry, _):
        server.events("/v1/completions", {**BODY, "prompt": "#"})
        wait_for_responses(server, 1)
        telemetry._spans.force_flush()
        (span,) = exporter.get_finished_spans()
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (200, "engine_error")
    assert span.status.status_code.name == "ERROR"


def test_a_collector_gets_spans_and_metrics_over_http():
    with collector() as sink:
        with live_server(otlp_endpoint=f"http://127.0.0.1:{sink.server_port}/") as server:
            assert server.post("/v1/completions", json=BODY, headers=HEADERS).status_code == 200
        spans = [
            span
            for request in sink.received["/v1/traces"]
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        names = {
            metric.name
            for request in sink.received["/v1/metrics"]
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }
        assert b"MARKER" not in sink.raw
    assert [span.trace_id.hex() for span in spans] == [TRACE]
    assert "gen_ai.server.request.duration" in names


class HangingExporter(SpanExporter):
    """Takes spans and never comes back."""

    def __init__(self):
        self.release = threading.Event()

    def export(self, spans):
        self.release.wait(60)
        return SpanExportResult.FAILURE


def test_a_collector_that_hangs_delays_neither_requests_nor_the_end(monkeypatch):
    exporter = HangingExporter()
    try:
        with observed_server(monkeypatch, exporter) as (server, telemetry, _):
            for _ in range(3):
                assert server.post("/v1/completions", json=BODY).status_code == 200
            started = time.monotonic()
            telemetry.close(patience_seconds=0.2)
            assert time.monotonic() - started < 10
    finally:
        exporter.release.set()


def test_a_collector_that_is_not_there_is_no_requests_trouble():
    with live_server(otlp_endpoint="http://127.0.0.1:9") as server:
        assert server.post("/v1/completions", json=BODY).status_code == 200
        assert server.get("/health/ready").status_code == 200


def test_without_the_extra_the_message_names_it(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "service.otlp")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(QerveError, match=r"qerve\[otlp\]"), live_server(otlp_endpoint="http://127.0.0.1:9"):
        pass
