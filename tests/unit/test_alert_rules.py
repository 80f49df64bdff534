"""The alert rules ask for what the service exposes, fire when they should and not otherwise, and say what to do."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.ops_tools import run_tool
from tests.support.promql import Series, exposed_series, problems, read

ROOT = Path(__file__).resolve().parents[2]
RULES_PATH = ROOT / "deploy" / "prometheus" / "rules" / "qerve.yml"
TESTS = ROOT / "tests" / "alerts"
GROUPS = yaml.safe_load(RULES_PATH.read_text(encoding="utf-8"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


@pytest.fixture(scope="module")
def exposed() -> dict[str, Series]:
    return exposed_series()


@pytest.fixture(scope="module")
def runbook() -> str:
    return (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_every_rule_selects_what_the_service_exposes_or_another_rule_records(exposed: dict[str, Series]) -> None:
    named = [(rule.get("alert", rule.get("record")), rule["expr"]) for rule in RULES]
    assert [found for title, expr in named for found in problems(title, expr, exposed, RECORDED)] == []


def test_rejection_reasons_in_rules_are_ones_that_the_service_gives(exposed: dict[str, Series]) -> None:
    with_reason = {
        value
        for rule in RULES
        for _, label, values in read(rule["expr"]).matches
        if label == "reason"
        for value in values.split("|")
    }
    assert with_reason <= rejection_reasons()
    assert with_reason


def rejection_reasons() -> set[str]:
    from service.metrics.catalogue import REJECTIONS

    return set(REJECTIONS)


def test_recorded_series_are_used_by_alerts() -> None:
    used = set().union(*(read(rule["expr"]).metrics for rule in ALERTS.values()))
    assert used >= RECORDED


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_is_wrong_where_how_bad_and_what_to_do(name: str, runbook: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    section = re.search(rf"^### {name}$(.*?)(?=^##|\Z)", runbook, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/operations.md has no section {name}"
    assert all(f"**{part}.**" in section[1] for part in ("Means", "Look", "Do"))


def test_runbook_has_no_section_of_an_alert_that_is_gone(runbook: str) -> None:
    assert set(re.findall(r"^### (Qerve\w+)$", runbook, flags=re.MULTILINE)) == set(ALERTS)


def test_promtool_finds_the_rules_well_formed() -> None:
    checked = run_tool("promtool", "check", "rules", RULES_PATH)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(RULES)} rules found" in checked.stdout


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_otherwise(path: Path) -> None:
    checked = run_tool("promtool", "test", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def unit_tests_of(alert: str, folder: Path) -> list[Path]:
    """The promtool tests whose name begins with ``alert``, as files under ``folder`` beside a copy of the rules."""
    found = []
    for path in sorted(TESTS.glob("*.yml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        document["tests"] = [test for test in document["tests"] if test["name"].startswith(alert)]
        document["rule_files"] = ["rules.yml"]
        if document["tests"]:
            (folder / path.name).write_text(yaml.safe_dump(document), encoding="utf-8")
            found.append(folder / path.name)
    return found


def passes_with(rules: dict[str, Any], alert: str, folder: Path) -> bool:
    (folder / "rules.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (path,) = unit_tests_of(alert, folder)
    return run_tool("promtool", "test", "rules", path).returncode == 0


def with_expression(alert: str, expression: str) -> dict[str, Any]:
    groups = yaml.safe_load(RULES_PATH.read_text(encoding="utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"] if rule.get("alert") == alert):
        rule["expr"] = expression
    return {"groups": groups}


def check_that_tests_of(alert: str, folder: Path) -> None:
    assert passes_with({"groups": GROUPS}, alert, folder)
    assert not passes_with(with_expression(alert, "vector(1)"), alert, folder), f"no test says when {alert} is silent"
    assert not passes_with(with_expression(alert, "vector(1) > 2"), alert, folder), f"no test says when {alert} fires"


def test_alert_that_always_or_never_fires_is_noticed(tmp_path: Path) -> None:
    check_that_tests_of("QerveCanaryDrift", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("alert", [name for name in ALERTS if name != "QerveCanaryDrift"])
def test_every_alert_that_always_or_never_fires_is_noticed(alert: str, tmp_path: Path) -> None:
    check_that_tests_of(alert, tmp_path)


# --- Prometheus' and Alertmanager's configuration --------------------------------------------------------------------


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    assert "/etc/prometheus/rules/*.yml" in text
    shutil.copytree(RULES_PATH.parent, tmp_path / "rules")
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/rules", str(tmp_path / "rules")))
    checked = run_tool("promtool", "check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_amtool_accepts_the_configuration_and_every_alert_reaches_a_receiver_that_tells_nobody() -> None:
    path = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
    checked = run_tool("amtool", "check-config", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for severity in sorted({rule["labels"]["severity"] for rule in ALERTS.values()}):
        routed = run_tool("amtool", "config", "routes", "test", f"--config.file={path}", f"severity={severity}")
        assert routed.stdout.strip() == "nobody"
    receivers = yaml.safe_load(path.read_text(encoding="utf-8"))["receivers"]
    assert receivers == [{"name": "nobody"}]


def test_inhibit_rules_name_alerts_that_there_are() -> None:
    document = yaml.safe_load((ROOT / "deploy" / "alertmanager" / "alertmanager.yml").read_text(encoding="utf-8"))
    matchers = [
        text for rule in document["inhibit_rules"] for text in (*rule["source_matchers"], *rule["target_matchers"])
    ]
    names = {name for text in matchers for name in re.findall(r"Qerve\w+", text)}
    assert names <= set(ALERTS)
