"""The page of a comparison: one HTML file that needs nothing else, with plotly.js and all data in it."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ..errors import QerveError
from ..plain import finite
from .figures import figures
from .labels import recipe_label
from .result import Comparison
from .table import Column, columns, front_names

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Cell:
    """value: what sorting compares, empty for what was not measured; text: what people read."""

    value: str
    text: str
    is_number: bool


@dataclass(frozen=True, slots=True)
class Row:
    """kind: its CSS classes; label: settings in one line."""

    name: str
    kind: str
    label: str
    error: str | None
    cells: tuple[Cell, ...]


def missing_for_page() -> str | None:
    """Why the page cannot be made, and what to do; None: it can."""
    return None if find_spec("plotly") else "the HTML report needs the package plotly: pip install 'qerve[report]'"


def comparison_page(comparison: Comparison) -> str:
    """The page of ``comparison``; equal comparisons give equal pages.

    Raises:
        QerveError: plotly is not installed.
    """
    if problem := missing_for_page():
        raise QerveError(problem)
    from plotly.offline import get_plotlyjs

    found = columns(comparison)
    return (
        environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            columns=found,
            rows=_rows(comparison, found),
            figures=[
                {"id": item.id, "heading": item.heading, "caption": item.caption, "json": embedded(item.to_json())}
                for item in figures(comparison)
            ],
            data=embedded(json.dumps(page_data(comparison), allow_nan=False)),
            plotly=Markup(get_plotlyjs()),  # noqa: S704 the installed plotly's own source
            css=raw("base.css"),
            script=raw("compare.js"),
        )
    )


def page_data(comparison: Comparison) -> dict[str, Any]:
    """The table's numbers for programs that read the page: by row, by column; None: not measured."""
    found = columns(comparison)
    return {
        row.name: {column.name: finite(column.values[index]) for column in found}
        for index, row in enumerate(comparison.results)
    }


def environment() -> Environment:
    """Templates of this package; everything that they print is escaped."""
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, keep_trailing_newline=True)


def raw(name: str) -> Markup:
    """A style sheet or script of this package, as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 a file of this package


def embedded(text: str) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(safe)  # noqa: S704 made safe above


def _rows(comparison: Comparison, found: list[Column]) -> list[Row]:
    front = set(front_names(comparison, comparison.texts[0])) if comparison.texts else set()
    texts = [column.texts() for column in found]
    rows = []
    for index, result in enumerate(comparison.results):
        kinds = {"dense": result.is_dense, "front": result.name in front, "failed": result.error is not None}
        values = [finite(column.values[index]) for column in found]
        cells = tuple(
            Cell("" if value is None else str(value), shown[index], column.is_number)
            for column, value, shown in zip(found, values, texts, strict=True)
        )
        label = "the checkpoint itself" if result.config is None else recipe_label(result.config)
        rows.append(
            Row(result.name, " ".join(kind for kind, holds in kinds.items() if holds), label, result.error, cells)
        )
    return rows
