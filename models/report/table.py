"""The rows of a comparison as columns: for the terminal, for CSV and for the page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from .labels import recipe_label
from .pareto import pareto_front
from .result import Comparison, RecipeResult

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its name in CSV, its heading for people, its values (None: not measured) and their format."""

    name: str
    heading: str
    values: tuple[float | str | None, ...]
    spec: str = ""

    @property
    def is_number(self) -> bool:
        """Right-aligned, and sorted as numbers."""
        return bool(self.spec)

    def texts(self) -> list[str]:
        """The values as people read them."""
        return ["–" if value is None else format(value, self.spec) for value in self.values]


def columns(comparison: Comparison) -> list[Column]:
    """The columns of all rows, in the order of ``comparison.results``; failed rows have no numbers."""
    rows = comparison.results
    dense = comparison.dense
    found = [
        Column("name", "recipe", tuple(row.name for row in rows)),
        Column("effective_bits", "bits", tuple(row.effective_bits for row in rows), ".3f"),
    ]
    for text in comparison.texts:
        perplexities = tuple(row.perplexity(text) for row in rows)
        found.append(Column(f"perplexity {text}", f"perplexity, {text}", perplexities, ".3f"))
        if dense is not None and (reference := dense.perplexity(text)):
            ratios = tuple(None if value is None else value / reference for value in perplexities)
            found.append(Column(f"times_dense {text}", f"× dense, {text}", ratios, ".3f"))
    for task in comparison.tasks:
        found += _task_columns(task, rows)
    found += [
        Column("output_error", "output error", tuple(row.output_error for row in rows), ".4f"),
        Column("artifact_mib", "MiB", tuple(_scaled(row.artifact_bytes, MIB) for row in rows), ".1f"),
        Column("build_seconds", "build s", tuple(row.build_seconds for row in rows), ".1f"),
        Column("peak_memory_mib", "peak MiB", tuple(_scaled(row.peak_memory_bytes, MIB) for row in rows), ".0f"),
        Column("statistics", "statistics", tuple(row.statistics for row in rows)),
    ]
    return [column for column in found if any(value is not None for value in column.values)]


def front_names(comparison: Comparison, text: str) -> list[str]:
    """Names of the recipes on the Pareto front of effective bits and perplexity of ``text``."""
    rows = [(row, row.effective_bits, row.perplexity(text)) for row in comparison.recipes]
    points = [(row.name, bits, value) for row, bits, value in rows if bits is not None and value is not None]
    return [points[index][0] for index in pareto_front([point[1:] for point in points])]


def to_csv(comparison: Comparison) -> str:
    """One line per measured, failed and external row; ``origin`` tells them apart, numbers are at full precision."""
    found = columns(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(column.name for column in found), "recipe", "origin", "error"])
    for index, row in enumerate(comparison.results):
        values = [column.values[index] for column in found]
        settings = "" if row.config is None else recipe_label(row.config)
        writer.writerow(["" if value is None else value for value in values] + [settings, "measured", row.error or ""])
    for item in comparison.external:
        known: dict[str, object] = {"name": item.name, "effective_bits": item.effective_bits}
        known[f"perplexity {item.text}"] = item.perplexity
        writer.writerow([*(known.get(column.name, "") for column in found), "", item.mark, ""])
    return stream.getvalue()


def _task_columns(task: str, rows: Sequence[RecipeResult]) -> list[Column]:
    scores = [next((score for score in row.tasks if score.task == task), None) for row in rows]
    fields = {"acc": ".4f", "acc_stderr": ".4f", "acc_norm": ".4f", "acc_norm_stderr": ".4f", "perplexity": ".3f"}
    found = []
    for field, spec in fields.items():
        values = tuple(None if score is None else getattr(score, field) for score in scores)
        heading = f"{task} {field.replace('_stderr', ' ±').replace('_', ' ')}"
        found.append(Column(f"{field} {task}", heading, values, spec))
    return found


def _scaled(value: float | None, unit: int) -> float | None:
    return None if value is None else value / unit
