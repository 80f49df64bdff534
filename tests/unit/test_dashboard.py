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
from grafana_foundation_sdk.models import dashboard as grafana

from tests.support.promql import Series, exposed_series, problems, read
from tools.dashboard import build, to_json

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
ROWS = ["Traffic", "Latency", "Saturation", "Memory", "Quality"]
REQUIRED = {
    "qerve_num_requests_running", "qerve_num_requests_waiting", "qerve_kv_cache_usage_perc",
    "qerve_prompt_tokens_total", "qerve_generation_tokens_total", "qerve_request_success_total",
    "qerve_time_to_first_token_seconds_bucket", "qerve_inter_token_latency_seconds_bucket",
    "qerve_e2e_request_latency_seconds_bucket", "process_resident_memory_bytes", "qerve_process_memory_bytes",
    "qerve_cgroup_memory_bytes", "qerve_cuda_memory_bytes", "qerve_model_weight_bytes", "qerve_oom_headroom_bytes",
    "qerve_model_effective_bits_per_weight", "qerve_requests_rejected_total", "qerve_perplexity_requests_total",
    "qerve_canary_perplexity", "qerve_nonfinite_logits_total", "qerve_ready",
}  # fmt: skip


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
    return exposed_series()


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            legend = frozenset(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
            yield Query(panel["title"], target["expr"], legend)


def complaints(query: Query, exposed: dict[str, Series]) -> list[str]:
    """What ``query`` asks for that is not there, or shows that is aggregated away."""
    hidden = query.legend_labels - read(query.expression).grouped
    found = problems(query.title, query.expression, exposed)
    return found + [f"{query.title}: the legend shows {name}, which is aggregated away" for name in hidden]


def test_every_query_selects_what_the_service_exposes(dashboard: dict[str, Any], exposed: dict[str, Series]) -> None:
    assert [problem for query in queries_of(dashboard) for problem in complaints(query, exposed)] == []


def test_dashboard_shows_traffic_latency_tokens_memory_and_weights(dashboard: dict[str, Any]) -> None:
    used = set().union(*(read(query.expression).metrics for query in queries_of(dashboard)))
    assert REQUIRED - used == set()


def test_rows_are_the_five_aspects_on_one_time_axis(dashboard: dict[str, Any]) -> None:
    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == ROWS
    assert not any("timeFrom" in panel or "timeShift" in panel for panel in dashboard["panels"])


def test_variables_list_values_of_exposed_labels_and_every_query_heeds_them(
    dashboard: dict[str, Any], exposed: dict[str, Series]
) -> None:
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["model_name", "instance"]
    for variable in dashboard["templating"]["list"]:
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
        assert problems(variable["name"], selector, exposed) == []
        assert label in exposed["qerve_num_requests_running"].labels | {"instance"}
    for query in queries_of(dashboard):
        asked = read(query.expression)
        for metric in asked.metrics:
            heeded = {label for name, label, value in asked.matches if (name, value) == (metric, f"${label}")}
            assert heeded == {"instance"} | (exposed[metric].labels & {"model_name"}), query


def test_dashboard_is_what_the_builder_writes_and_grafanas_classes_know_all_of_it(dashboard: dict[str, Any]) -> None:
    assert to_json(build()) == (GRAFANA / "dashboards" / "qerve.json").read_text(encoding="utf-8"), (
        "run python -m tools.dashboard"
    )
    assert json.loads(to_json(grafana.Dashboard.from_json(dashboard))) == dashboard


def test_field_that_grafana_does_not_know_is_noticed(dashboard: dict[str, Any]) -> None:
    misspelt = {**dashboard, "refersh": "10s"}
    assert json.loads(to_json(grafana.Dashboard.from_json(misspelt))) != misspelt


def test_alerts_are_marked_in_every_panel(dashboard: dict[str, Any]) -> None:
    (annotation,) = dashboard["annotations"]["list"]
    assert read(annotation["expr"]).metrics == {"ALERTS"}
    assert annotation["enable"] is True


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
    assert complaint in " ".join(complaints(Query("panel", expression, frozenset()), exposed))


def test_legend_of_an_aggregated_label_is_noticed(exposed: dict[str, Series]) -> None:
    query = Query("panel", "sum(qerve_model_weight_bytes)", frozenset({"component"}))
    assert "aggregated away" in " ".join(complaints(query, exposed))


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ('a_total{job="b_total", x=~"$y"}', {"a_total"}, {"job", "x"}),
        ("sum by (le, c) (rate(a_bucket[$__rate_interval]))", {"a_bucket"}, {"le", "c"}),
        ("a / on (x) group_left (y) b:c unless d offset 5m", {"a", "b:c", "d"}, {"x", "y"}),
        ("histogram_quantile(0.99, sum without (x) (a))", {"a"}, {"x"}),
        ("max(a) > bool 1e3", {"a"}, set()),
    ],
)
def test_names_are_read_from_promql(expression: str, metrics: set[str], labels: set[str]) -> None:
    assert read(expression).metrics == metrics
    assert read(expression).labels == labels
