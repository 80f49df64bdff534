"""Writes the Grafana dashboard from ``tools.dashboard_panels`` with Grafana's own builders.

python -m tools.dashboard            writes deploy/grafana/dashboards/qerve.json

The JSON is committed: Grafana reads it as it is, and a test says when it is out of date.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from .dashboard_panels import ROWS, Kind, Query, View

PATH = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards" / "qerve.json"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
HEIGHT = 8
MODELS = "label_values(qerve_num_requests_running, model_name)"
INSTANCES = 'label_values(qerve_num_requests_running{model_name=~"$model_name"}, instance)'


def build() -> models.Dashboard:
    """The dashboard as Grafana's own classes."""
    board = (
        dashboard.Dashboard("qerve")
        .uid("qerve")
        .description("Traffic, latency, saturation, memory and quality of the service on one time axis")
        .tags(["qerve"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .variables([_variable("model_name", "model", MODELS), _variable("instance", "instance", INSTANCES)])
        .annotations([_alerts()])
    )
    number = 0
    for title, views in ROWS:
        number += 1
        board.with_row(dashboard.Row(title).id(number))
        for view in views:
            number += 1
            board.with_panel(_panel(view).id(number))
    return board.build()


def to_json(board: models.Dashboard) -> str:
    """The file's text."""
    return json.dumps(board, cls=JSONEncoder, indent=2) + "\n"


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text=["All"], value=["$__all"]))
    )


def _alerts() -> dashboard.AnnotationQuery:
    """Firing alerts as red regions over every panel."""
    return (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertstate="firing", alertname=~"Qerve.*", instance=~"$instance"}')
    )


def _panel(view: View) -> Any:
    """The builder of one panel; the builders share their methods but no class."""
    panel = _BUILDERS[view.kind]()
    panel.title(view.title).description(view.description).unit(view.unit).datasource(SOURCE)
    panel.span(view.width).height(HEIGHT)
    for letter, query in zip("ABCDEF", view.queries, strict=False):
        panel.with_target(_target(query, letter, view.kind))
    return panel


def _target(query: Query, letter: str, kind: Kind) -> Builder[Any]:
    target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter).datasource(SOURCE)
    if kind == "table":
        target.format(PromQueryFormat.TABLE)
    return target.instant() if kind in {"bars", "number", "table"} else target.range()


def _lines() -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = (
        common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING)
    )
    return (
        timeseries.Panel()
        .min(0)
        .fill_opacity(10)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(tooltip)
    )


def _stacked() -> timeseries.Panel:
    return _lines().stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).fill_opacity(40)


def _state() -> statetimeline.Panel:
    options = {
        "0": models.ValueMappingResult(text="not ready", color="red"),
        "1": models.ValueMappingResult(text="ready", color="green"),
    }
    return statetimeline.Panel().mappings([models.ValueMap(options=options)]).merge_values(True)


def _table() -> table.Panel:
    labels_only = models.DataTransformerConfig(
        id_val="organize", options={"excludeByName": {"Time": True, "Value": True}}
    )
    return table.Panel().show_header(True).with_transformation(labels_only)


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"])


_BUILDERS: dict[Kind, Callable[[], Any]] = {
    "lines": _lines,
    "stacked": _stacked,
    "state": _state,
    "bars": lambda: (
        bargauge.Panel().orientation(common_models.VizOrientation.HORIZONTAL).min(0).reduce_options(_last())
    ),
    "number": lambda: stat.Panel().decimals(2).reduce_options(_last()),
    "table": _table,
}


if __name__ == "__main__":
    PATH.write_text(to_json(build()), encoding="utf-8")
    print(PATH)
