"""One figure of a comparison's page, and the colours and lines that all of them use.

Plotly is imported where a figure is checked. Fonts, backgrounds and grid lines are the page's, which knows light from
dark.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

MAX_SHOWN = 10
"""Recipes that a crowded figure shows at first; the others are a click in the legend away."""

COLORS = (
    "#2a78d6", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#b08900", "#5f3dc4", "#868e96", "#8d5524",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
ACCENT, NEUTRAL = COLORS[0], "#868e96"

Trace: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: its id in the page, a heading, what it shows, and plotly's traces and layout."""

    id: str
    heading: str
    caption: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """What the page hands to plotly.js, checked by plotly.

        Raises:
            ValueError: a trace or layout that plotly does not know.
        """
        from plotly.graph_objects import Figure as PlotlyFigure

        figure = PlotlyFigure(data=self.traces, layout=self.layout | {"template": None})
        text: str = figure.to_json(engine="json")
        return text


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the ``index``-th line."""
    return {"color": color(index), "dash": DASHES[index // len(COLORS) % len(DASHES)], "width": 2}


def color(index: int) -> str:
    """Colour of the ``index``-th thing."""
    return COLORS[index % len(COLORS)]


def visibility(index: int) -> Trace:
    """Whether the ``index``-th of many recipes is shown from the start."""
    return {} if index < MAX_SHOWN else {"visible": "legendonly"}
