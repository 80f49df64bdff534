"""Figures about the linear layers of each recipe: their errors by projection, depth and rank, singular values."""

from collections.abc import Iterator

from .figure import Figure, Trace, color, line_style, visibility
from .labels import in_network_order, recipe_label
from .result import Comparison, RecipeResult

LOG_ERROR = {"title": {"text": "relative output error"}, "type": "log", "minorloglabels": "complete"}


def layer_figure(comparison: Comparison) -> Figure | None:
    """Output error of the layers by projection, one box per recipe."""
    traces = []
    for index, row in enumerate(_with_errors(comparison)):
        errors = [(path.rsplit(".", 1)[-1], path, score) for path, score in row.layers.items() if score.output_error]
        traces.append(
            visibility(index)
            | {
                "type": "box",
                "name": row.name,
                "x": [projection for projection, _, _ in errors],
                "y": [score.output_error for _, _, score in errors],
                "text": [path.removeprefix("model.") for _, path, _ in errors],
                "marker": {"color": color(index), "size": 3},
                "line": {"width": 1},
                "boxpoints": "all",
                "jitter": 0.4,
                "pointpos": 0,
                "hovertemplate": "%{text}<br>%{y:.4f}<extra>" + row.name + "</extra>",
            }
        )
    order = in_network_order(name for trace in traces for name in trace["x"])
    layout = {
        "boxmode": "group",
        "xaxis": {"categoryorder": "array", "categoryarray": order},
        "yaxis": LOG_ERROR | {"dtick": "D2"},
    }
    caption = (
        "Root mean square error of each linear layer's outputs over the calibration inputs, relative to the outputs; "
        "grouped by projection. Inputs are those that the build saw."
    )
    return Figure("layers", "Output error by projection", caption, traces, layout) if traces else None


def depth_figure(comparison: Comparison) -> Figure | None:
    """Output error of the decoder layers, root mean square over their projections, by depth."""
    traces = []
    num_layers = 0
    for index, row in enumerate(_with_errors(comparison)):
        by_layer: dict[int, list[float]] = {}
        for path, score in row.layers.items():
            if score.output_error is not None:
                by_layer.setdefault(int(path.split(".")[2]), []).append(score.output_error**2)
        depths = sorted(by_layer)
        num_layers = max(num_layers, len(depths))
        traces.append(
            visibility(index)
            | {
                "type": "scatter",
                "mode": "lines+markers",
                "name": row.name,
                "x": depths,
                "y": [(sum(by_layer[depth]) / len(by_layer[depth])) ** 0.5 for depth in depths],
                "line": line_style(index),
                "marker": {"size": 4},
                "hovertemplate": "layer %{x}<br>%{y:.4f}<extra>" + row.name + "</extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "decoder layer"}, "dtick": max(1, num_layers // 16)},
        "yaxis": LOG_ERROR,
    }
    caption = "The same errors by depth: root mean square over the projections of a decoder layer."
    return Figure("depth", "Output error by depth", caption, traces, layout) if traces else None


def rank_figure(comparison: Comparison) -> Figure | None:
    """Output error against rank, for recipes that differ in nothing else."""
    groups: dict[str, list[tuple[int, RecipeResult]]] = {}
    for row in _with_errors(comparison):
        reconstruct = (row.config or {}).get("reconstruct") or {}
        rank = 0 if reconstruct.get("method") == "none" else int(reconstruct.get("rank", 0))
        groups.setdefault(recipe_label(row.config or {}, with_rank=False), []).append((rank, row))
    traces: list[Trace] = []
    for label, members in groups.items():
        ordered = sorted(members, key=lambda item: item[0])
        if len({rank for rank, _ in ordered}) < 2:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": [rank for rank, _ in ordered],
                "y": [row.output_error for _, row in ordered],
                "text": [row.name for _, row in ordered],
                "line": line_style(len(traces)),
                "hovertemplate": "<b>%{text}</b><br>rank %{x}: %{y:.4f}<extra></extra>",
            }
        )
    layout = {"xaxis": {"title": {"text": "rank"}}, "yaxis": LOG_ERROR}
    caption = "Root mean square over all linear layers, for recipes that differ in nothing but the rank."
    return Figure("rank", "Rank against error", caption, traces, layout) if traces else None


def spectrum_figure(comparison: Comparison) -> Figure | None:
    """What is left of the quantization error after a correction of each rank, by layer and recipe."""
    rows = [row for row in comparison.recipes if row.spectra]
    found = {path.rpartition(".")[2]: path for row in rows for path in row.spectra}
    paths = [found[name] for name in in_network_order(found)]
    traces, owners = [], []
    for path in paths:
        for index, row in enumerate(rows):
            for trace in _spectrum_traces(row, path, index):
                traces.append(trace | {"visible": path == paths[0]})
                owners.append(path)
    buttons = [
        {
            "label": path.removeprefix("model."),
            "method": "restyle",
            "args": ["visible", [own == path for own in owners]],
        }
        for path in paths
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "showactive": True}
    layout = {
        "updatemenus": [menu],
        "xaxis": {"title": {"text": "rank"}, "type": "log"},
        "yaxis": {"title": {"text": "relative error left"}},
    }
    caption = (
        "Singular values of the quantization error in the middle decoder layer, summed up from the end: the error that "
        "the best correction of each rank leaves. Solid: of the weight. Dashed: of the outputs, weighted with the "
        "inputs' autocorrelation, which is kept for calibration on dense inputs."
    )
    return Figure("spectrum", "Singular-value decay", caption, traces, layout) if traces else None


def _spectrum_traces(row: RecipeResult, path: str, index: int) -> Iterator[Trace]:
    spectrum = row.spectra.get(path)
    if spectrum is None:
        return
    for values, total, kind, dash in (
        (spectrum.plain, spectrum.plain_total, "weight", "solid"),
        (spectrum.weighted, spectrum.weighted_total, "outputs", "dash"),
    ):
        if not values or total <= 0:
            continue
        left, remaining = [], total
        for value in values:
            remaining = max(remaining - value * value, 0.0)
            left.append(round((remaining / total) ** 0.5, 6))
        yield {
            "type": "scatter",
            "mode": "lines",
            "name": f"{row.name}, {kind}",
            "x": list(range(1, len(values) + 1)),
            "y": left,
            "line": {"color": color(index), "dash": dash, "width": 2},
            "hovertemplate": "rank %{x}: %{y:.3f} left<extra>" + f"{row.name}, {kind}</extra>",
        }


def _with_errors(comparison: Comparison) -> list[RecipeResult]:
    return [row for row in comparison.recipes if row.output_error]
