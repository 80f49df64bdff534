"""``qerve compare``: a grid of recipes on one checkpoint, measured alike."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cli_output import WIDE, RichObserver
from .errors import QerveError
from .plain import finite

if TYPE_CHECKING:
    from .compare.config import CompareConfig
    from .report.result import Comparison, RecipeResult

EXAMPLE = "qerve compare examples/compare.toml --out compare/smollm2"

SHOWN = frozenset(
    {"name", "effective_bits", "perplexity", "times_dense", "acc", "acc_stderr", "output_error", "build_seconds"}
)
"""Columns of the table on a terminal; CSV, JSON and the page have all."""


def compare(
    config: Annotated[Path, typer.Argument(help="What to compare (.toml, .json); see docs/compare.md.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Directory for results. [default: output in CONFIG]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every recipe and list them; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Build and evaluate many recipes from one checkpoint, and report them side by side."""
    from .build.recipe import training_method
    from .compare.config import CompareConfig
    from .compare.output import to_dict, write_outputs
    from .compare.run import compare as run_comparison
    from .memory import keep_large_blocks, map_large_blocks
    from .report.page import missing_for_page

    settings = CompareConfig.read(config)
    if dry_run:
        _print_plan(settings, as_json=as_json)
        return
    target = out or (Path(settings.output) if settings.output else None)
    if target is None:
        raise QerveError(f"{config}: where do the results go? Give --out DIRECTORY, or output in the file")
    if problem := missing_for_page():
        sys.stderr.write(f"note: {problem}; tables and JSON are written without it, and a later run adds the page\n")
    trains = any(training_method(recipe.build) is not None for recipe in settings.expanded())
    (keep_large_blocks if trains else map_large_blocks)()
    observer = CompareBars()
    header = _header(device)
    try:
        comparison = run_comparison(settings, target, device=device, observer=observer, header=header)
    finally:
        observer.stop()
    written = write_outputs(comparison, target)
    if as_json:
        print(json.dumps(finite(to_dict(comparison))))
    else:
        print_comparison(comparison)
    sys.stderr.write("".join(f"wrote {path}\n" for path in written))
    _fail_if_any_failed(comparison)


class CompareBars:
    """Comparison observer: a line per row, and under it the bars of the row that is measured."""

    def __init__(self) -> None:
        self._bars: RichObserver | None = None
        self._console = Console(stderr=True, highlight=False)

    def stop(self) -> None:
        """Take down the bars."""
        if self._bars is not None:
            self._bars.__exit__(None, None, None)
            self._bars = None

    def row_started(self, name: str, number: int, total: int) -> None:
        """A headline, and new bars."""
        self.stop()
        self._console.print(f"[bold]{number}/{total} {name}[/bold]")
        self._bars = RichObserver().__enter__()

    def row_finished(self, result: "RecipeResult", *, is_reused: bool) -> None:
        """Its first perplexity, or why there is none."""
        self.stop()
        shown = f"perplexity {result.texts[0].perplexity:.3f}" if result.texts else "measured"
        if result.error is not None:
            shown = f"failed: {result.error}"
        self._console.print(f"{result.name}: {shown}{' (from an earlier run)' if is_reused else ''}", markup=False)

    def phase(self, name: str, total: int) -> None:
        """A new bar."""
        if self._bars is not None:
            self._bars.phase(name, total)

    def progress(self, done: int, note: str = "") -> None:
        """Move the bar."""
        if self._bars is not None:
            self._bars.progress(done, note)


def print_comparison(comparison: "Comparison") -> None:
    """The main columns of all rows on stdout, the Pareto front marked, external rows in a table of their own."""
    from .report.table import columns, front_names

    found = [column for column in columns(comparison) if column.name.split()[0] in SHOWN]
    front = set(front_names(comparison, comparison.texts[0])) if comparison.texts else set()
    table = Table(title=comparison.title, title_justify="left", caption="* on the Pareto front", caption_justify="left")
    for column in found:
        table.add_column(column.heading, justify="right" if column.is_number else "left", no_wrap=column.name == "name")
    texts = [column.texts() for column in found]
    for index, row in enumerate(comparison.results):
        name = f"{row.name} *" if row.name in front else row.name
        cells = [name] + ["failed" if row.error else text[index] for text in texts[1:]]
        table.add_row(*cells, style="red" if row.error else "bold" if row.is_dense else None)
    console = _console()
    console.print(table, crop=False)
    if comparison.external:
        apart = Table("name", "bits", "perplexity", "text", "origin", title="From elsewhere", title_justify="left")
        for item in comparison.external:
            apart.add_row(item.name, f"{item.effective_bits:.3f}", f"{item.perplexity:.3f}", item.text, item.mark)
        console.print(apart, crop=False)


def _console() -> Console:
    """Standard output; a file or a pipe is as wide as the table."""
    console = Console()
    return console if console.is_terminal else Console(width=10 * WIDE)


def _print_plan(settings: "CompareConfig", *, as_json: bool) -> None:
    from .compare.run import check_recipe
    from .llama.checkpoint import open_checkpoint
    from .report.labels import recipe_label

    checkpoint, recipes = open_checkpoint(settings.checkpoint), settings.expanded()
    for recipe in recipes:
        check_recipe(recipe, checkpoint)
    if as_json:
        print(json.dumps({recipe.name: recipe.build.to_dict() for recipe in recipes}))
        return
    table = Table(
        "recipe", "what it is", title=f"{len(recipes)} recipes for {settings.checkpoint}", title_justify="left"
    )
    for recipe in recipes:
        table.add_row(recipe.name, recipe_label(recipe.build.to_dict()))
    _console().print(table, crop=False)


def _header(device: str) -> dict[str, str]:
    import torch

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": f"{torch.__version__}, {device}, {torch.get_num_threads()} threads",
    }


def _fail_if_any_failed(comparison: "Comparison") -> None:
    failed = [row for row in comparison.results if row.error is not None]
    if failed:
        reasons = "".join(f"\n  {row.name}: {row.error}" for row in failed)
        raise QerveError(
            f"{len(failed)} of {len(comparison.results)} rows failed; a later run tries them again:{reasons}"
        )
