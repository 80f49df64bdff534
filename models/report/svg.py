"""Coordinates of small drawings; templates turn them into SVG. Sizes in CSS pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .figure import color

WIDTH, HEIGHT = 880.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 12.0, 28.0
CELL_HEIGHT = 22.0
LABEL_WIDTH = 84.0
_TINY = 1e-12
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where it is, and what it says."""

    position: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its points as an SVG ``points`` attribute."""

    name: str
    color: str
    points: str


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over a whole-number axis, on a logarithmic scale."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True, slots=True)
class Square:
    """One cell: place, strength of its colour from 0 to 1, and what it says when pointed at."""

    x: float
    y: float
    strength: float
    text: str


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Cells in named rows, stronger for larger values, on a logarithmic scale."""

    width: float
    height: float
    cell_width: float
    cell_height: float
    squares: tuple[Square, ...]
    row_labels: tuple[Tick, ...]
    least: float
    largest: float


def line_chart(series: Mapping[str, Sequence[tuple[int, float]]]) -> LineChart:
    """Lines of ``series``: by name, points (x, value) in order; values not above 0 are left out."""
    values = [value for points in series.values() for _, value in points if value > 0]
    depths = [x for points in series.values() for x, _ in points]
    low, high = _log_range(values)
    last = max(1, *depths) if depths else 1
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + (right - LEFT) * x / last

    def y_of(value: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(value) - low) / (high - low)

    lines = tuple(
        Line(name, color(index), " ".join(f"{x_of(x):.1f},{y_of(value):.1f}" for x, value in points if value > 0))
        for index, (name, points) in enumerate(series.items())
    )
    step = max(1, math.ceil(last / 16))
    x_ticks = tuple(Tick(round(x_of(x), 1), str(x)) for x in range(0, last + 1, step))
    y_ticks = tuple(Tick(round(y_of(value), 1), f"{value:g}") for value in log_ticks(low, high))
    return LineChart(WIDTH, HEIGHT, LEFT, right, bottom, lines, x_ticks, y_ticks)


def heatmap(rows: Mapping[str, Sequence[tuple[int, float, str]]]) -> Heatmap:
    """Cells of ``rows``: by name, (column, value, what it says)."""
    cells = [(row, *cell) for row, members in enumerate(rows.values()) for cell in members]
    values = [value for _, _, value, _ in cells if value > 0]
    low, high = _log_range(values)
    num_columns = 1 + max((column for _, column, _, _ in cells), default=0)
    cell_width = min((WIDTH - LABEL_WIDTH) / num_columns, 3 * CELL_HEIGHT)
    squares = tuple(
        Square(
            x=round(LABEL_WIDTH + column * cell_width, 1),
            y=row * CELL_HEIGHT,
            strength=round(_strength(value, low, high), 2),
            text=text,
        )
        for row, column, value, text in cells
    )
    labels = tuple(Tick((row + 0.5) * CELL_HEIGHT, name) for row, name in enumerate(rows))
    return Heatmap(
        width=WIDTH,
        height=len(rows) * CELL_HEIGHT,
        cell_width=round(cell_width - 1, 1),
        cell_height=CELL_HEIGHT - 1,
        squares=squares,
        row_labels=labels,
        least=min(values, default=0.0),
        largest=max(values, default=0.0),
    )


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between ``10**low`` and ``10**high``."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in _STEPS]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    """Exponents that hold all ``values`` with a little room."""
    if not values:
        return -1.0, 0.0
    low, high = math.log10(max(min(values), _TINY)), math.log10(max(*values, _TINY))
    room = max(0.05 * (high - low), 0.1)
    return low - room, high + room


def _strength(value: float, low: float, high: float) -> float:
    return 0.0 if value <= 0 else 0.06 + 0.94 * min(1.0, max(0.0, (math.log10(value) - low) / (high - low)))
