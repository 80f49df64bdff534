"""A picture of the dashboard's panels from the data of a fault run; phases are shaded, firing alerts are red."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

NUM_COLUMNS = 3
PANEL_HEIGHT = 210
WIDTH = 1800
UNITS = {"bytes": (1 << 20, "MiB"), "percentunit": (0.01, "%"), "s": (1, "s"), "reqps": (1, "req/s")}
LINES = frozenset({"timeseries", "state-timeline"})


def draw(data: dict[str, Any], report: dict[str, Any], out: Path) -> None:
    """Write dashboard.html and, where there is a Chromium, dashboard.png."""
    panels = [panel for panel in data["panels"] if panel["type"] in LINES and panel["lines"]]
    num_rows = -(-len(panels) // NUM_COLUMNS)
    titles = [f"{panel['title']} ({UNITS.get(panel['unit'], (1, ''))[1] or 'number'})" for panel in panels]
    figure = make_subplots(
        num_rows, NUM_COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / num_rows, horizontal_spacing=0.04
    )
    for index, panel in enumerate(panels):
        row, column = divmod(index, NUM_COLUMNS)
        _add_panel(figure, panel, data["start"], row + 1, column + 1)
    _mark(figure, report)
    figure.update_layout(
        width=WIDTH, height=PANEL_HEIGHT * num_rows + 120, showlegend=False, template="plotly_white",
        title=f"qerve under injected faults, {datetime.fromtimestamp(data['start'], UTC):%Y-%m-%d %H:%M} UTC; seconds",
        margin={"l": 50, "r": 20, "t": 90, "b": 30}, font={"size": 11},
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(range=[0, data["end"] - data["start"]])
    figure.write_html(out / "dashboard.html", include_plotlyjs=True)
    _photograph(out / "dashboard.html", out / "dashboard.png", PANEL_HEIGHT * num_rows + 120)


def _add_panel(figure: go.Figure, panel: dict[str, Any], start: float, row: int, column: int) -> None:
    scale, _ = UNITS.get(panel["unit"], (1, ""))
    for line in panel["lines"]:
        values = [float(value) / scale for _, value in line["values"]]
        times = [moment - start for moment, _ in line["values"]]
        figure.add_trace(go.Scatter(x=times, y=values, name=line["legend"], line={"width": 1.2}), row=row, col=column)
        last = next((value for value in reversed(values) if value == value), None)
        if last is not None and len(panel["lines"]) <= 6:
            figure.add_annotation(
                x=times[-1], y=last, text=line["legend"], showarrow=False, xanchor="right", yanchor="bottom",
                font={"size": 9}, row=row, col=column,
            )  # fmt: skip


def _mark(figure: go.Figure, report: dict[str, Any]) -> None:
    for index, phase in enumerate(report["phases"]):
        color = "rgba(0,0,0,0.05)" if index % 2 else "rgba(0,0,0,0)"
        figure.add_vrect(x0=phase["from"], x1=phase["to"], fillcolor=color, line_width=0, row="all", col="all")
    for spans in report["firing"].values():
        for first, last in spans:
            figure.add_vrect(
                x0=first, x1=max(last, first + 1), fillcolor="rgba(220,0,0,0.06)", line_width=0, row="all", col="all"
            )


def _photograph(page: Path, picture: Path, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{height}"]
    command = [browser, *options, "--virtual-time-budget=20000", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=False, capture_output=True, timeout=180)
