"""Every query of the Grafana dashboard selects metrics, labels and types that the running service really exposes."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service import memory
from tests.support.api_server import live_server
from tests.support.deploy import promql_labels, promql_metrics

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
SCRAPE_LABELS = {"job", "instance"}  # Prometheus adds them
REQUIRED = {
    "qerve_num_requests_running", "qerve_num_requests_waiting", "qerve_kv_cache_usage_perc",
    "qerve_prompt_tokens_total", "qerve_generation_tokens_total", "qerve_request_success_total",
    "qerve_time_to_first_token_seconds_bucket", "qerve_inter_token_latency_seconds_bucket",
    "qerve_e2e_request_latency_seconds_bucket", "process_resident_memory_bytes", "qerve_process_memory_bytes",
    "qerve_cgroup_memory_bytes", "qerve_cuda_memory_bytes", "qerve_model_weight_bytes",
    "qerve_model_effective_bits_per_weight", "qerve_requests_rejected_total", "qerve_perplexity_requests_total",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """What the service says about one metric."""

    labels: frozenset[str]
    is_counter: bool


@dataclass(frozen=True)
class Query:
    """One query of the dashboard, with the labels that its legend shows."""

    title: str
    expression: str
    legend_labels: frozenset[str]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "dashboards" / "qerve.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exposed() -> dict[str, Series]:
    """Scraped from a server that has answered, scored and refused something, and that has a GPU and a container."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "cuda_memory", lambda: {(0, "allocated"): 1})
        patch.setattr(memory, "cgroup_memory", lambda: {"current": 1, "max": 2})
        patch.setattr(memory, "process_memory", lambda: {"rss_anon": 1})
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


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            legend = frozenset(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
            yield Query(panel["title"], target["expr"], legend)


def problems(query: Query, exposed: dict[str, Series]) -> list[str]:
    """What ``query`` asks for that is not there."""
    metrics = promql_metrics(query.expression)
    unknown = metrics - exposed.keys()
    if unknown or not metrics:
        return [f"{query.title}: no such metric {sorted(unknown)} in {query.expression}"]
    known = SCRAPE_LABELS.union(*(exposed[name].labels for name in metrics))
    found = [f"{query.title}: no label {name}" for name in promql_labels(query.expression) - known]
    rated = set(re.findall(r"\b(?:rate|increase)\(\s*(\w+)", query.expression))
    found += [f"{query.title}: the rate of the gauge {name}" for name in rated if not exposed[name].is_counter]
    found += [f"{query.title}: the bare counter {n}" for n in metrics - rated if exposed[n].is_counter]
    grouped = set().union(*(g.replace(" ", "").split(",") for g in re.findall(r"\bby \(([^)]*)\)", query.expression)))
    found += [
        f"{query.title}: the legend shows {name}, which is aggregated away" for name in query.legend_labels - grouped
    ]
    return found


def test_every_query_selects_what_the_service_exposes(dashboard: dict[str, Any], exposed: dict[str, Series]) -> None:
    assert [problem for query in queries_of(dashboard) for problem in problems(query, exposed)] == []


def test_dashboard_shows_traffic_latency_tokens_memory_and_weights(dashboard: dict[str, Any]) -> None:
    used = set().union(*(promql_metrics(query.expression) for query in queries_of(dashboard)))
    assert REQUIRED - used == set()


def test_model_variable_lists_values_of_an_exposed_label(dashboard: dict[str, Any], exposed: dict[str, Series]) -> None:
    (variable,) = dashboard["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
    assert label in exposed[metric].labels
    assert variable["definition"] == variable["query"]["query"]
    used = [query for query in queries_of(dashboard) if "$" + variable["name"] in query.expression]
    assert all(f'{label}=~"${variable["name"]}"' in query.expression for query in used)
    assert used


def test_every_query_uses_the_provisioned_data_source(dashboard: dict[str, Any]) -> None:
    provisioned = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text(encoding="utf-8")
    )
    known = [{"type": source["type"], "uid": source["uid"]} for source in provisioned["datasources"]]
    holders = [*panels_of(dashboard), *(t for p in panels_of(dashboard) for t in p["targets"])]
    holders += dashboard["templating"]["list"]
    assert [holder for holder in holders if holder["datasource"] not in known] == []


def test_panels_have_their_own_ids_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        for g in (panel["gridPos"] for panel in panels)
    ]
    assert all(not a & b for a, b in combinations(cells, 2))
    assert all(0 <= x < 24 for cell in cells for x, _ in cell)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("sum(qerve_num_requests_runing)", "no such metric"),
        ("sum(rate(vllm:prompt_tokens_total[5m]))", "no such metric"),
        ("sum by (colour) (qerve_model_weight_bytes)", "no label colour"),
        ('sum(qerve_model_weight_bytes{model="x"})', "no label model"),
        ("rate(qerve_num_requests_running[5m])", "rate of the gauge"),
        ("sum(qerve_prompt_tokens_total)", "bare counter"),
        ("42", "no such metric"),
    ],
)
def test_wrong_query_is_noticed(exposed: dict[str, Series], expression: str, complaint: str) -> None:
    assert complaint in " ".join(problems(Query("panel", expression, frozenset()), exposed))


def test_legend_of_an_aggregated_label_is_noticed(exposed: dict[str, Series]) -> None:
    query = Query("panel", "sum(qerve_model_weight_bytes)", frozenset({"component"}))
    assert "aggregated away" in " ".join(problems(query, exposed))


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ('a_total{job="b_total", x=~"$y"}', {"a_total"}, {"job", "x"}),
        ("sum by (le, c) (rate(a_bucket[$__rate_interval]))", {"a_bucket"}, {"le", "c"}),
        ("a / on (x) group_left b:c unless d offset 5m", {"a", "b:c", "d"}, {"x"}),
        ("histogram_quantile(0.99, sum without (x) (a))", {"a"}, {"x"}),
        ("max(a) > bool 1e3", {"a"}, set()),
    ],
)
def test_names_are_read_from_promql(expression: str, metrics: set[str], labels: set[str]) -> None:
    assert promql_metrics(expression) == metrics
    assert promql_labels(expression) == labels
