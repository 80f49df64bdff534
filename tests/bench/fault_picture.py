"""A picture of the dashboard's panels from the data of a fault run; phases are shaded, firing alerts are red."""

import shutil
import subprocess
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

NUM_COLUMNS = 3
PANEL_HEIGHT = 230
MOST_NAMES = 7
WIDTH = 1800
UNITS = {"bytes": (1 << 20, "MiB"), "percentunit": (0.01, "%"), "s": (1, "s"), "reqps": (1, "req/s")}
LINES = frozenset({"timeseries", "state-timeline"})


def draw(data: dict[str, Any], report: dict[str, Any], out: Path) -> None:
    """Write dashboard.html and, where there is a Chromium, dashboard.png."""
    panels = [panel for panel in data["panels"] if panel["type"] in LINES and panel["lines"]]
    num_rows = -(-len(panels) // NUM_COLUMNS)
    titles = [_title(panel) for panel in panels]
    figure = make_subplots(
        num_rows, NUM_COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / num_rows, horizontal_spacing=0.04
    )
    for index, panel in enumerate(panels):
        row, column = divmod(index, NUM_COLUMNS)
        _add_panel(figure, panel, data["start"], row + 1, column + 1)
    figure.update_layout(
        width=WIDTH, height=PANEL_HEIGHT * num_rows + 120, showlegend=False, template="plotly_white",
        title=f"qerve under injected faults, {datetime.fromtimestamp(data['start'], UTC):%Y-%m-%d %H:%M} UTC; seconds",
        shapes=_marks(report, len(panels)),
        margin={"l": 50, "r": 30, "t": 110, "b": 30}, font={"size": 11},
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(range=[0, data["end"] - data["start"]])
    figure.update_annotations(font_size=11)
    figure.write_html(out / "dashboard.html", include_plotlyjs=True, config={"displayModeBar": False})
    _photograph(out / "dashboard.html", out / "dashboard.png", PANEL_HEIGHT * num_rows + 160)


def _add_panel(figure: go.Figure, panel: dict[str, Any], start: float, row: int, column: int) -> None:
    scale, _ = UNITS.get(panel["unit"], (1, ""))
    for index, line in enumerate(panel["lines"]):
        points = _with_gaps([(moment - start, float(value) / scale) for moment, value in line["values"]])
        look = {"width": 1.2, "color": _color(index)}
        trace = go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], line=look, mode="lines")
        figure.add_trace(trace, row=row, col=column)


def _with_gaps(points: list[tuple[float, float]]) -> list[tuple[float, float | None]]:
    """A break in the line wherever there was no data."""
    step = min((b[0] - a[0] for a, b in pairwise(points)), default=0)
    found: list[tuple[float, float | None]] = []
    for point in points:
        if found and point[0] - found[-1][0] > 1.5 * step:
            found.append((point[0], None))
        found.append(point)
    return found


def _title(panel: dict[str, Any]) -> str:
    unit = UNITS.get(panel["unit"], (1, ""))[1]
    lines = list(enumerate(panel["lines"]))
    if len(lines) > MOST_NAMES:  # those with something to see
        lines = [(index, line) for index, line in lines if any(float(value) for _, value in line["values"])]
    names = [f'<span style="color:{_color(index)}">{line["legend"]}</span>' for index, line in lines[:MOST_NAMES]]
    return f"<b>{panel['title']}</b>{f' ({unit})' if unit else ''}<br>{'  '.join(names)}"


def _color(index: int) -> str:
    return qualitative.D3[index % len(qualitative.D3)]


def _marks(report: dict[str, Any], num_panels: int) -> list[dict[str, Any]]:
    """Rectangles over every panel: each second phase in grey, firing alerts in red."""
    spans = [(phase["from"], phase["to"], "rgba(0,0,0,0.05)") for phase in report["phases"][1::2]]
    spans += [(a, max(b, a + 1), "rgba(220,0,0,0.06)") for fired in report["firing"].values() for a, b in fired]
    look = {"type": "rect", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
    return [
        {**look, "xref": f"x{number}", "yref": f"y{number} domain", "x0": first, "x1": last, "fillcolor": color}
        for number in ("", *range(2, num_panels + 1))
        for first, last, color in spans
    ]


def _photograph(page: Path, picture: Path, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{height}"]
    command = [browser, *options, "--virtual-time-budget=20000", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=False, capture_output=True, timeout=180)
