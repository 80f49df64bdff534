"""What a comparison leaves behind beside its rows: one table as CSV, as JSON, and the page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report.page import comparison_page, missing_for_page
from ..report.result import Comparison
from ..report.table import front_names, to_csv
from .storage import write_file, write_json


def write_outputs(comparison: Comparison, out: Path) -> list[Path]:
    """Write ``results.csv``, ``results.json`` and, where plotly is installed, ``report.html`` into ``out``.

    Raises:
        QerveError: one cannot be written.
    """
    written = [out / "results.csv", out / "results.json"]
    write_file(written[0], to_csv(comparison).encode("utf-8"))
    write_json(written[1], to_dict(comparison))
    if missing_for_page() is None:
        written.append(out / "report.html")
        write_file(written[-1], comparison_page(comparison).encode("utf-8"))
    return written


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything, plain: rows with their configurations, layers and spectra, external rows apart, Pareto fronts."""
    rows = [row.to_dict() | {"perplexities": {text: row.perplexity(text) for text in comparison.texts}} for row in
            comparison.results]  # fmt: skip
    return {
        "title": comparison.title,
        "header": comparison.header,
        "results": rows,
        "external": [asdict(item) for item in comparison.external],
        "pareto_front": {text: front_names(comparison, text) for text in comparison.texts},
    }
