"""Prints what a bench found."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from models.bench.gpu_peaks import BF16, COPY, INT8
from models.bench.peaks import MULTIPLY, READ
from models.bench.report import Report, aim_cells, layer_cells, operator_cells, percent, speed_columns, times

_WIDTH = 200
_OPERATOR_HEADINGS = ("phase", "operator", "ms", "share", "MB", "GB/s", "of peak", "GMAC/s", "of peak")

_LAYER_HEADINGS = ("layer", "M", "way", "us", "of the limit", "cuBLAS bf16 : this", "low-rank")
_TEXTS = frozenset({"", "phase", "operator", "peak", "tokens/s", "layer", "way", "aim", "wanted", "met"})


def print_report(report: Report) -> None:
    """Tables on standard output: what was measured, peaks, speeds, streams, operators, and what is missing."""
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    _print(console, "bench", None, [[name, value] for name, value in report.about.items()])
    _print(console, "peaks of this machine", ("peak", "value", "spread"), _peak_rows(report))
    columns = speed_columns(report)
    if columns and columns[0][1]:
        rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
        _print(console, "speeds", [heading for heading, _ in columns], rows)
    if report.streams is not None:
        ratio = report.samples.ratio(report.streams[1], report.streams[0])
        rows = [[name, f"{report.samples.median(name):.1f}"] for name in report.streams] + [
            ["HTTP : engine", times(ratio)]
        ]
        _print(console, "whole requests, tokens/s", ("", "tokens/s"), rows)
    _print(console, "operators, all layers together", _OPERATOR_HEADINGS, operator_cells(report.operators))
    _print(console, "layers", _LAYER_HEADINGS, layer_cells(report.layers))
    _print(console, "aims", ("aim", "wanted", "measured", "met"), aim_cells(report.aims))
    gone = {**report.missing, **report.samples.failed}
    _print(console, "not measured", None, [[name, reason] for name, reason in gone.items()])


def _peak_rows(report: Report) -> list[list[str]]:
    samples = report.samples
    units = {READ: "GB/s", COPY: "GB/s", BF16: "Gop/s", INT8: "Gop/s"}
    return [
        [
            metric,
            f"{(samples.median(metric) or 0) / 1e9:.1f} {units.get(metric, 'GMAC/s')}",
            percent(samples.spread(metric)),
        ]
        for metric in samples.values
        if metric in units or metric.startswith(MULTIPLY)
    ]


def _print(console: Console, title: str, headings: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", show_header=headings is not None)
    for heading in headings or ("",) * len(rows[0]):
        is_number = heading not in _TEXTS
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
