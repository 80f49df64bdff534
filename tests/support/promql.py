"""What a PromQL expression asks for, read with the parser of a library; and what the service exposes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import memory
from tests.support.api_server import live_server

GRAFANA_VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "30m"}
SCRAPE_LABELS = frozenset({"job", "instance"})  # Prometheus adds them
SCRAPE_METRICS = frozenset({"up", "ALERTS"})  # and these
RATES = frozenset({"rate", "increase", "irate"})


@dataclass(frozen=True)
class Series:
    """What the service says about one metric."""

    labels: frozenset[str]
    is_counter: bool


@dataclass
class Asked:
    """What an expression selects.

    metrics: names of the selected series
    rated:   of those, the ones whose growth is taken
    labels:  that it matches on, groups by or joins on
    grouped: that it groups by
    matches: (metric, label, value)
    """

    metrics: set[str] = field(default_factory=set)
    rated: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    grouped: set[str] = field(default_factory=set)
    matches: set[tuple[str, str, str]] = field(default_factory=set)

    def add_selector(self, selector: Any) -> None:
        self.metrics.add(selector.name)
        for matcher in selector.matchers.matchers:
            self.labels.add(matcher.name)
            self.matches.add((selector.name, matcher.name, matcher.value))


def read(expression: str) -> Asked:
    """Raises ValueError where ``expression`` is no PromQL."""
    for name, value in GRAFANA_VARIABLES.items():
        expression = expression.replace(name, value)
    asked = Asked()

    def visit(node: Any) -> None:
        kind = type(node).__name__
        if kind == "VectorSelector":
            asked.add_selector(node)
        elif kind == "Call" and node.func.name in RATES:
            asked.rated.add(node.args[0].vector_selector.name)
        elif kind == "AggregateExpr" and node.modifier is not None:
            asked.labels.update(node.modifier.labels)
            asked.grouped.update(node.modifier.labels)
        elif kind == "BinaryExpr" and node.modifier is not None:
            matching = node.modifier.matching
            asked.labels.update(matching.labels if matching else [], node.modifier.group_labels or [])

    promql_parser.walk(promql_parser.parse(expression), visit)
    return asked


def problems(title: str, expression: str, exposed: dict[str, Series], recorded: Iterable[str] = ()) -> list[str]:
    """What ``expression`` asks for that is neither exposed nor ``recorded`` by a rule."""
    asked = read(expression)
    unknown = asked.metrics - exposed.keys() - SCRAPE_METRICS - set(recorded)
    if unknown or not asked.metrics:
        return [f"{title}: no such metric {sorted(unknown)} in {expression}"]
    measured = asked.metrics & exposed.keys()
    known = SCRAPE_LABELS.union(*(exposed[name].labels for name in measured))
    found = [] if measured < asked.metrics else [f"{title}: no label {name}" for name in asked.labels - known]
    found += [f"{title}: the rate of the gauge {name}" for name in asked.rated if not exposed[name].is_counter]
    return found + [f"{title}: the bare counter {name}" for name in measured - asked.rated if exposed[name].is_counter]


def exposed_series() -> dict[str, Series]:
    """Scraped from a server that has answered, scored and refused something, and that has a GPU and a container."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cuda_memory", lambda *_: {(0, "allocated"): 1})
        patch.setattr(memory, "cgroup_memory", lambda *_: {"current": 1, "max": 2})
        patch.setattr(memory, "process_memory", lambda *_: {"rss_anon": 1})
        with live_server() as server:
            answered = server.post("/v1/completions", json={"model": "fake", "prompt": "hello", "max_tokens": 3})
            scored = server.post("/v1/perplexity", json={"model": "fake", "text": "hello world"})
            assert (answered.status_code, scored.status_code) == (200, 200)
            server.context.metrics.rejected("queue_full")
            text = server.get("/metrics").text
    return {
        sample.name: Series(frozenset(sample.labels), family.type in {"counter", "histogram"})
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
