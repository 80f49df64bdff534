"""The figures of a comparison's page: perplexity against size, task accuracy, cost; and those about its layers."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from .figure import COLORS, NEUTRAL, SYMBOLS, Figure, Trace, color
from .labels import method_label, recipe_label
from .layer_figures import depth_figure, layer_figure, rank_figure, spectrum_figure
from .result import Comparison, RecipeResult
from .table import MIB, front_names

_HEADROOM = 1.15
"""How far above the worst of the recipes that matter the axis of perplexity goes at first."""


def figures(comparison: Comparison) -> list[Figure]:
    """Every figure that ``comparison`` has data for."""
    per_text = [perplexity_figure(comparison, number, text) for number, text in enumerate(comparison.texts)]
    makers: tuple[Callable[[Comparison], Figure | None], ...] = (
        accuracy_figure, layer_figure, depth_figure, rank_figure, spectrum_figure, cost_figure,
    )  # fmt: skip
    return [figure for figure in [*per_text, *(make(comparison) for make in makers)] if figure is not None]


def perplexity_figure(comparison: Comparison, number: int, text: str) -> Figure | None:
    """Perplexity of ``text`` against effective bits, with the Pareto front, external results and the dense line."""
    rows = [row for row in comparison.recipes if math.isfinite(row.perplexity(text) or math.inf) and row.effective_bits]
    if not rows:
        return None
    front = set(front_names(comparison, text))
    traces = list(_recipe_points(rows, text))
    traces += _front_line([row for row in rows if row.name in front], text)
    external = [item for item in comparison.external if item.text == text]
    if external:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "not measured here",
                "x": [item.effective_bits for item in external],
                "y": [item.perplexity for item in external],
                "marker": {"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": NEUTRAL}},
                "customdata": [[item.name, item.mark] for item in external],
                "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:.3f} bits, perplexity %{y:.3f}"
                "<br><i>%{customdata[1]}</i><extra></extra>",
            }
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "effective bits per weight (linear layers)"}},
        "yaxis": {"title": {"text": f"perplexity of {text}"}, "type": "log", "minorloglabels": "complete"},
    }
    dense = comparison.dense and comparison.dense.perplexity(text)
    if dense and math.isfinite(dense):
        layout |= _dense_line(dense)
    caption = (
        "Lower and further left is better. The line joins the recipes that no other beats in both. Bits count codes, "
        "scales, zero points and factors."
    )
    shown = [row.perplexity(text) or 0.0 for row in rows if row.name in front] + [it.perplexity for it in external]
    num_above = sum((row.perplexity(text) or 0.0) > _HEADROOM * max(shown) for row in rows)
    if dense and math.isfinite(dense) and num_above:
        layout["yaxis"]["range"] = [math.log10(dense / 1.03), math.log10(_HEADROOM * max(shown))]
        caption += f" {num_above} of them lie above what is shown; a double click shows all."
    return Figure(f"perplexity-{number}", f"Perplexity of {text} against size", caption, traces, layout)


def _recipe_points(rows: list[RecipeResult], text: str) -> Iterator[Trace]:
    methods = list(dict.fromkeys(method_label(row.config or {}) for row in rows))
    for index, method in enumerate(methods):
        members = [row for row in rows if method_label(row.config or {}) == method]
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": method,
            "x": [row.effective_bits for row in members],
            "y": [row.perplexity(text) for row in members],
            "marker": {
                "size": 10,
                "color": color(index),
                "symbol": SYMBOLS[index // len(COLORS) % len(SYMBOLS)],
            },
            "customdata": [[row.name, recipe_label(row.config or {})] for row in members],
            "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:.3f} bits, perplexity %{y:.3f}"
            "<br>%{customdata[1]}<extra></extra>",
        }


def _front_line(rows: list[RecipeResult], text: str) -> list[Trace]:
    points = sorted((row.effective_bits or 0.0, row.perplexity(text) or 0.0) for row in rows)
    if len(points) < 2:
        return []
    line = {"width": 1.5, "color": NEUTRAL, "shape": "hv"}
    x, y = zip(*points, strict=True)
    return [
        {"type": "scatter", "mode": "lines", "name": "Pareto front", "x": x, "y": y, "line": line, "hoverinfo": "skip"}
    ]


def _dense_line(perplexity: float) -> dict[str, Any]:
    line = {"color": NEUTRAL, "width": 1, "dash": "dash"}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": perplexity, "y1": perplexity, "line": line}
    return {
        "shapes": [shape],
        "annotations": [
            {
                "text": f"dense {perplexity:.3f}",
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                # Annotations on a logarithmic axis are placed by exponent, shapes by value.
                "y": math.log10(perplexity),
                "yanchor": "bottom",
                "showarrow": False,
            }
        ],
    }


def accuracy_figure(comparison: Comparison) -> Figure | None:
    """Task accuracy with standard errors, dense first."""
    traces = []
    for index, task in enumerate(comparison.tasks):
        scores = [(row.name, score) for row in comparison.measured for score in row.tasks if score.task == task]
        accuracies = [100 * score.acc for _, score in scores if score.acc is not None]
        errors = [100 * (score.acc_stderr or 0.0) for _, score in scores if score.acc is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": task,
                "x": [name for name, score in scores if score.acc is not None],
                "y": accuracies,
                "error_y": {"type": "data", "array": errors, "thickness": 1.5, "width": 4, "color": color(index)},
                "marker": {"color": color(index), "size": 9, "symbol": SYMBOLS[index % len(SYMBOLS)]},
                "hovertemplate": "<b>%{x}</b><br>%{y:.2f} % ± %{error_y.array:.2f}<extra>" + task + "</extra>",
            }
        )
    layout = {
        "scattermode": "group",
        "scattergap": 0.6,
        "yaxis": {"title": {"text": "accuracy, %"}},
        "xaxis": {"tickangle": -30, "type": "category"},
    }
    caption = "Fraction of rows answered rightly, with its standard error over the rows."
    return Figure("accuracy", "Task accuracy", caption, traces, layout) if traces else None


def cost_figure(comparison: Comparison) -> Figure | None:
    """Build time and peak memory of every recipe."""
    rows = [row for row in reversed(comparison.recipes) if row.build_seconds is not None]
    if not rows:
        return None
    names = [row.name for row in rows]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": "build time",
            "y": names,
            "x": [row.build_seconds for row in rows],
            "marker": {"color": color(0)},
            "customdata": [f"statistics {row.statistics}" for row in rows],
            "hovertemplate": "<b>%{y}</b><br>%{x:.1f} s<br>%{customdata}<extra></extra>",
        },
        {
            "type": "bar",
            "orientation": "h",
            "name": "peak memory",
            "y": names,
            "x": [(row.peak_memory_bytes or 0) / MIB for row in rows],
            "xaxis": "x2",
            "marker": {"color": color(1)},
            "hovertemplate": "<b>%{y}</b><br>%{x:.0f} MiB<extra></extra>",
        },
    ]
    layout = {
        "xaxis": {"title": {"text": "build time, s"}, "domain": [0, 0.48]},
        "xaxis2": {"title": {"text": "peak memory above start, MiB"}, "domain": [0.52, 1]},
        "yaxis": {"automargin": True},
        "showlegend": False,
        "height": 140 + 26 * len(rows),
    }
    caption = (
        "Time includes collecting the statistics, unless they were cached (hover). Memory is what the process held "
        "above its start."
    )
    return Figure("cost", "Time and memory", caption, traces, layout)
