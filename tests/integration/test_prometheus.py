"""The real Prometheus scrapes the running service: every panel has data, every rule evaluates, no alert fires."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.api_server import LiveServer, live_server
from tests.support.ops_tools import require_tool
from tests.support.prometheus_server import (
    ROOT,
    RULES,
    Prometheus,
    alertmanager,
    prometheus,
    scaled_rules,
    wait_until,
    why_no_alertmanager,
)

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "qerve.json"
VARIABLES = {"$model_name": ".*", "$instance": ".*", "$__rate_interval": "10s"}
WITHOUT_DATA_HERE = {"GPU memory"}  # no GPU


def dashboard_queries() -> list[tuple[str, str]]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def send_requests(server: LiveServer) -> None:
    body = {"model": "fake", "prompt": "hello hello", "max_tokens": 4}
    assert server.post("/v1/completions", json=body).status_code == 200
    assert server.post("/v1/perplexity", json={"model": "fake", "text": "hello world"}).status_code == 200
    assert server.post("/v1/completions", json={**body, "prompt": "long " * 900}).status_code == 400


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Prometheus]]:
    require_tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with live_server() as server, prometheus(folder, server.url.removeprefix("http://"), "500ms") as watcher:
        watcher.wait_for("up == 1")
        for wanted in ("> 0", "> 2"):  # a rate needs two different values
            send_requests(server)
            watcher.wait_for(f'qerve_request_success_total{{finished_reason!="abort"}} {wanted}')
            send_requests(server)
        yield server, watcher


def test_every_panel_query_has_data(watched: tuple[LiveServer, Prometheus]) -> None:
    _, watcher = watched
    empty = [(title, expr) for title, expr in dashboard_queries() if not watcher.query(filled_in(expr))]
    assert {title for title, _ in empty} <= WITHOUT_DATA_HERE, empty


def test_what_happened_is_what_the_dashboard_shows(watched: tuple[LiveServer, Prometheus]) -> None:
    _, watcher = watched
    shown: dict[str, Any] = {title: watcher.query(filled_in(expr)) for title, expr in dashboard_queries()}
    latest = {title: [float(series["value"][1]) for series in result] for title, result in shown.items()}
    assert any(value > 0 for value in latest["HTTP responses"])
    assert max(latest["Process memory"]) > 1 << 20
    assert all(not math.isnan(value) for value in latest["Time to first token"])
    assert sum(latest["Weights by component"]) > 0


def test_every_rule_evaluates_and_no_alert_fires(watched: tuple[LiveServer, Prometheus]) -> None:
    _, watcher = watched
    wait_until(
        lambda: all(rule["health"] == "ok" for rule in watcher.rules()), complaint="a rule has not been evaluated"
    )
    rules = watcher.rules()
    assert len(rules) > 10
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")] == []
    assert [rule["name"] for rule in rules if rule.get("state", "inactive") == "firing"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert [name for name in recorded if not watcher.query(name)] == []


def test_alert_of_a_lost_service_reaches_alertmanager(tmp_path: Path) -> None:
    if reason := why_no_alertmanager():
        pytest.skip(reason)
    rules = scaled_rules(RULES.read_text(encoding="utf-8"), 1 / 60, shortest_range=2)
    with alertmanager(tmp_path) as manager:
        address = f"{manager.base_url.host}:{manager.base_url.port}"
        with (
            live_server() as server,
            prometheus(tmp_path, server.url.removeprefix("http://"), "500ms", rules, address) as watcher,
        ):
            watcher.wait_for("up == 1")
            server.server.should_exit = True
            watcher.wait_for('ALERTS{alertname="QerveTargetDown", alertstate="firing"}')
            wait_until(lambda: any(told["labels"]["alertname"] == "QerveTargetDown" for told in alerts_of(manager)))


def alerts_of(manager: Any) -> list[dict[str, Any]]:
    return manager.get("/api/v2/alerts").json()


def test_scaled_rules_keep_their_thresholds() -> None:
    text = "expr: rate(a[5m]) > 300 and b[10m] > 5\nfor: 2m\nexpr: c[1d]\n"
    scaled = "expr: rate(a[30s]) > 300 and b[60s] > 5\nfor: 12s\nexpr: c[8640s]\n"
    assert scaled_rules(text, 0.1, 5) == scaled
    assert scaled_rules("a[1m] for\nfor: 5s", 0.01, 5) == "a[5s] for\nfor: 1s"
