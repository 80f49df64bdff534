"""What the offline verbs print: progress bars on stderr, one table or one JSON object on stdout."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table

from .plain import finite

if TYPE_CHECKING:
    from .artifact.inspect import Inspection
    from .build import BuildReport

MIB = 2**20
GIB = 1 << 30
WIDE = 120
"""Columns of a table that goes to a file or a pipe."""


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        RemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


class RichObserver:
    """Build observer that draws one bar per phase."""

    def __init__(self) -> None:
        self._bars = _progress()
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def phase(self, name: str, total: int) -> None:
        """Complete the bar before, start a new one."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, completed=task.total, note="")
        self._task = self._bars.add_task(name, total=total, note="")

    def progress(self, done: int, note: str = "") -> None:
        """Move the current bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, note=note)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling the yielded ``(done, total)`` function."""
    with _progress() as bars:
        task = bars.add_task(description, total=None, note="")
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_json(values: dict[str, object]) -> None:
    """One JSON object on one line; numbers that JSON cannot hold become null."""
    print(json.dumps(finite(values)))


def _print_rows(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _number(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.1f} MiB"


def print_build_report(report: "BuildReport", *, as_json: bool) -> None:
    """The summary of one build."""
    if as_json:
        print_json(report.to_dict())
        return
    rows = {
        "holdout perplexity, dense": _number(report.dense_perplexity),
        "holdout perplexity, quantized": _number(report.quantized_perplexity),
        "  with embedding and head at 16 bits": _number(report.dense_vocabulary_perplexity),
        "effective bits per weight": _number(report.effective_bits),
        "artifact": f"{_mib(report.artifact_bytes)} (dense 16-bit: {_mib(report.dense_bytes)})",
        "time": f"{report.seconds:.1f} s",
        "peak memory": f"{_mib(report.peak_memory_bytes)} above start",
        "embedding + one layer + activations": _mib(report.memory_bound_bytes),
        "peak memory, preparation": f"{_mib(report.preparation_peak_bytes)} above start",
    }
    if report.dense_vocabulary_perplexity is None:
        del rows["  with embedding and head at 16 bits"]
    if report.num_resumed_layers:
        rows["layers taken over"] = f"{report.num_resumed_layers} from an interrupted build"
    _print_rows(report.artifact, rows)


def print_inspection(inspection: "Inspection", *, layers: bool, as_json: bool) -> None:
    """What is in an artifact."""
    if as_json:
        print_json(inspection.to_dict())
        return
    _print_rows(str(inspection.path), inspection.summary_rows())
    if layers:
        table = Table("layer", "bits", "group", "rank", "effective bits", "weight error", "output error", "backend")
        for column in (table.columns[0], table.columns[-1]):
            column.no_wrap = True
        for row in inspection.layer_rows():
            table.add_row(*row)
        console = Console()
        console.print(table, width=None if console.is_terminal else WIDE, crop=False)
