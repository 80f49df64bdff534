"""What a comparison is asked to do: frozen dataclasses, read from TOML or JSON.

A recipe is the ``base`` build configuration with the recipe's own values laid over it; a grid is the Cartesian product
of its axes, each point a recipe.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import with_config

from ..config import BuildConfig
from ..errors import SchemeError
from ..evaluate.corpora import Convention
from ..plain import from_plain, read_plain
from ..report.result import DENSE, ExternalResult
from ..scheme import STRICT
from .grid import GridConfig, expand
from .overlay import overlay

NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,149}"
"""Names become those of files and directories."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class TextConfig:
    """A text to measure token perplexity on.

    path:        UTF-8 text file; empty: the dataset of the convention, from the Hub
    convention:  how rows are joined and where the last window ends: plain, wikitext2, c4, c4-samples, ptb
    window:      tokens per window; windows do not overlap
    max_windows: only the first ones; None: all
    name:        what tables call it; empty: the file's name, or the convention
    """

    path: str = ""
    convention: Convention = "plain"
    window: int = 1024
    max_windows: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.path and self.convention == "plain":
            raise SchemeError("a text needs a path, or the convention of a dataset")
        if self.window < 2 or (self.max_windows is not None and self.max_windows < 1):
            raise SchemeError(f"text {self.label}: choose window 2 or more and max_windows 1 or more")

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or Path(self.path).name or self.convention


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class TaskConfig:
    """A task to measure accuracy on: a .jsonl file, or a name such as ``piqa``; max_rows: only the first; None: all."""

    task: str
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise SchemeError(f"task {self.task}: choose max_rows 1 or more")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """What every row, dense first, is measured on.

    dtype:   activations: ``auto`` is the device's own choice
    backend: kernel backend of the quantized layers; ``auto`` takes the first that can run each
    """

    texts: tuple[TextConfig, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    backend: str = "auto"


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ExternalConfig:
    """A result from elsewhere, drawn beside the measured ones and never mixed with them.

    source:  the publication it is quoted from, or
    command: the command that it was measured with; one of the two
    text:    the text it belongs to, as tables call it; empty: the first one
    """

    name: str
    effective_bits: float
    perplexity: float
    source: str = ""
    command: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if bool(self.source) == bool(self.command):
            raise SchemeError(
                f"external {self.name!r}: give either source (what it is quoted from) or command (what it was "
                "measured with)"
            )
        if not (0 < self.effective_bits < 64 and 1 <= self.perplexity < float("inf")):
            raise SchemeError(f"external {self.name!r}: effective_bits or perplexity is out of range")

    @property
    def mark(self) -> str:
        """Where it is from, as tables say it."""
        return f"quoted from {self.source}" if self.source else f"measured with {self.command}"


@dataclass(frozen=True, slots=True)
class RecipeConfig:
    """One row to build: its name and its whole build configuration."""

    name: str
    build: BuildConfig


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class CompareConfig:
    """A comparison on one checkpoint. Paths are relative to the working directory.

    checkpoint:     Hugging Face directory, .gguf file or Hub id
    output:         directory for results and report; empty: given on the command line
    base:           values of ``BuildConfig`` that all recipes share
    recipes:        each ``name`` and the values in which it differs from ``base``
    keep_artifacts: keep what was built, in ``output/artifacts``; otherwise each artifact goes once it is measured
    """

    checkpoint: str
    output: str = ""
    title: str = ""
    keep_artifacts: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    recipes: tuple[dict[str, Any], ...] = ()
    grid: tuple[GridConfig, ...] = ()
    external: tuple[ExternalConfig, ...] = ()

    @classmethod
    def from_dict(cls, values: object, where: str = "comparison") -> Self:
        """Validate ``values``, every recipe included.

        Raises:
            SchemeError: an unknown key, a wrong type, a value out of range, or two rows of one name or one
                configuration; names the recipe.
        """
        config = from_plain(cls, values, where)
        config._check(where)
        return config

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``path`` (.toml or .json).

        Raises:
            SchemeError: as ``from_dict``, or the file is missing or not well formed.
        """
        return cls.from_dict(read_plain(path), str(path))

    def expanded(self, where: str = "comparison") -> list[RecipeConfig]:
        """Every recipe in order: those with a name of their own, then the grids.

        Raises:
            SchemeError: one cannot be; names it.
        """
        recipes = [self._recipe(number, dict(values), where) for number, values in enumerate(self.recipes, start=1)]
        for number, grid in enumerate(self.grid, start=1):
            points = expand(grid, self.base, f"{where}: grid {number}")
            recipes += [_recipe_config(name, values, where) for name, values in points]
        _check_distinct(recipes, where)
        return recipes

    def external_results(self) -> tuple[ExternalResult, ...]:
        """The external rows as the report draws them."""
        first = self.evaluation.texts[0].label if self.evaluation.texts else ""
        return tuple(
            ExternalResult(row.name, row.effective_bits, row.perplexity, row.text or first, row.mark)
            for row in self.external
        )

    def _recipe(self, number: int, values: dict[str, Any], where: str) -> RecipeConfig:
        name = values.pop("name", None)
        if not isinstance(name, str):
            raise SchemeError(f"{where}: recipe {number} has no name; add name = '...'")
        return _recipe_config(name, overlay(self.base, values), where)

    def _check(self, where: str) -> None:
        if not self.evaluation.texts and not self.evaluation.tasks:
            raise SchemeError(f"{where}: nothing to measure: add [[evaluation.texts]] or [[evaluation.tasks]]")
        if not self.expanded(where):
            raise SchemeError(f"{where}: nothing to build: add [[recipes]] or [[grid]]")
        labels = [text.label for text in self.evaluation.texts]
        if twice := _first_twice(labels):
            raise SchemeError(f"{where}: two texts are called {twice!r}; give each a name")
        if twice := _first_twice([Path(task.task).stem for task in self.evaluation.tasks]):
            raise SchemeError(f"{where}: two tasks are called {twice!r}; rename a file")
        for row in self.external:
            if row.text and row.text not in labels:
                raise SchemeError(f"{where}: external {row.name!r}: no text is called {row.text!r}; choose of {labels}")


def _recipe_config(name: str, values: dict[str, Any], where: str) -> RecipeConfig:
    if re.fullmatch(NAME_PATTERN, name) is None or name == DENSE:
        raise SchemeError(
            f"{where}: a recipe cannot be called {name!r}: take letters, digits and . _ + = -, and not {DENSE!r}, "
            "which is the checkpoint itself"
        )
    return RecipeConfig(name, BuildConfig.from_dict(values, f"{where}: recipe {name}"))


def _check_distinct(recipes: list[RecipeConfig], where: str) -> None:
    if twice := _first_twice([recipe.name for recipe in recipes]):
        raise SchemeError(f"{where}: two recipes are called {twice!r}; rename one, or give the grid a name_template")
    seen: dict[str, str] = {}
    for recipe in recipes:
        former = seen.setdefault(json.dumps(recipe.build.to_dict(), sort_keys=True), recipe.name)
        if former != recipe.name:
            raise SchemeError(f"{where}: recipes {former} and {recipe.name} are the same configuration; remove one")


def _first_twice(names: list[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)
