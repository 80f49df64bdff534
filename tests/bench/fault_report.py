"""What Prometheus saw of a fault run, and whether the alerts that fired are those that should have."""

import json
from dataclasses import dataclass
from typing import Any

from tests.bench.fault_phases import NOT_INJECTED, Phase
from tests.support.prometheus_server import ROOT, Prometheus

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "qerve.json"
COUNTERS = (
    "qerve_requests_rejected_total", "qerve_client_disconnects_total", "qerve_deadline_exceeded_total",
    "qerve_nonfinite_logits_total", "qerve_request_success_total", "qerve_canary_checks_total",
)  # fmt: skip
SAMPLE_SECONDS = 2
Interval = tuple[float, float]


@dataclass(frozen=True)
class Window:
    """When a phase was, in Unix time."""

    phase: Phase
    start: float
    end: float


def intervals(times: list[float], step: float) -> list[Interval]:
    """Times a step apart as (first, last) of each run without a gap."""
    found: list[list[float]] = []
    for moment in times:
        if found and moment - found[-1][1] <= 1.5 * step:
            found[-1][1] = moment
        else:
            found.append([moment, moment])
    return [(first, last) for first, last in found]


def collect(watcher: Prometheus, windows: list[Window], factor: float) -> dict[str, Any]:
    """Firing alerts as intervals, counters' growth, and the data of every panel."""
    start, end = windows[0].start, windows[-1].end
    firing: dict[str, list[Interval]] = {}
    for series in watcher.query_range('ALERTS{alertstate="firing"}', start, end, 1):
        name = series["metric"]["alertname"]
        firing.setdefault(name, []).extend(intervals([moment for moment, _ in series["values"]], SAMPLE_SECONDS))
    counters = {}
    for name in COUNTERS:
        for series in watcher.query(f"increase({name}[{end - start:.0f}s]) > 0"):
            labels = [
                value for key, value in series["metric"].items() if key in {"reason", "finished_reason", "result"}
            ]
            counters[" ".join([name, *labels])] = round(float(series["value"][1]))
    panels = [_panel(watcher, panel, start, end, factor) for panel in _panels()]
    return {"start": start, "end": end, "firing": firing, "counters": counters, "panels": panels}


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return panels


def _panel(watcher: Prometheus, panel: dict[str, Any], start: float, end: float, factor: float) -> dict[str, Any]:
    step = max((end - start) / 300, 1)
    filled = {"$model_name": ".*", "$instance": ".*", "$__rate_interval": f"{max(60 * factor, 4):.0f}s"}
    lines = []
    for target in panel.get("targets", []):
        expression = target["expr"]
        for name, value in filled.items():
            expression = expression.replace(name, value)
        for series in watcher.query_range(expression, start, end, step):
            legend = target["legendFormat"]
            for label, value in series["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            lines.append({"legend": legend, "values": series["values"]})
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    return {"title": panel["title"], "type": panel["type"], "unit": unit, "lines": lines}


def judge(windows: list[Window], firing: dict[str, list[Interval]], hold: float) -> dict[str, Any]:
    """Hold what fired against the phases; an alert may begin up to ``hold`` seconds after its phase has ended."""
    begin = windows[0].start
    phases, missed, unexpected = [], [], []
    for window in windows:
        began = {name for name, spans in firing.items() if any(_is_in(first, window, hold) for first, _ in spans)}
        began |= {name for name, spans in firing.items() if any(a <= window.start <= b for a, b in spans)}
        missed += [f"{name} during '{window.phase.name}'" for name in sorted(window.phase.must - began)]
        phases.append(
            {
                "phase": window.phase.name,
                "from": round(window.start - begin),
                "to": round(window.end - begin),
                "must": sorted(window.phase.must),
                "fired": {
                    name: [round(first - begin) for first, _ in spans if window.start <= first < window.end]
                    for name, spans in sorted(firing.items())
                    if any(window.start <= first < window.end for first, _ in spans)
                },
            }
        )
    for name, spans in sorted(firing.items()):
        for first, last in spans:
            reasons = [w for w in windows if _is_in(first, w, hold) and name in w.phase.must | w.phase.may]
            if not reasons:
                unexpected.append(f"{name} from {first - begin:.0f} to {last - begin:.0f} s")
    return {
        "phases": phases,
        "missed": missed,
        "unexpected": unexpected,
        "firing": {name: [[round(a - begin), round(b - begin)] for a, b in spans] for name, spans in firing.items()},
        "not injected": NOT_INJECTED,
    }


def _is_in(moment: float, window: Window, hold: float) -> bool:
    return window.start <= moment <= window.end + hold


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Fault run",
        "",
        f"{report['seconds']:.0f} s; every range and `for` of the shipped rules times {report['factor']:.3g},",
        f"thresholds as shipped; scraped and evaluated every two seconds. Alertmanager: {report['alertmanager']}.",
        "",
        "| phase | seconds | must fire | began to fire (at second) |",
        "|---|---|---|---|",
    ]
    for phase in report["phases"]:
        fired = ", ".join(f"{name} ({', '.join(map(str, times))})" for name, times in phase["fired"].items())
        span = f"{phase['from']}-{phase['to']}"
        lines.append(f"| {phase['phase']} | {span} | {', '.join(phase['must'])} | {fired} |")
    lines += ["", f"Had to fire and did not: {', '.join(report['missed']) or 'none'}."]
    lines += [f"Fired without a reason: {', '.join(report['unexpected']) or 'none'}."]
    lines += ["Not injected: " + "; ".join(f"{name} ({why})" for name, why in report["not injected"].items()) + "."]
    lines += ["", "| what clients saw | number |", "|---|---|"]
    lines += [f"| {outcome} | {number} |" for outcome, number in report["clients"].items()]
    lines += ["", "| what Prometheus counted | number |", "|---|---|"]
    lines += [f"| `{name}` | {number} |" for name, number in report["counters"].items()]
    return "\n".join(lines) + "\n"
