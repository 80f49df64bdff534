"""What a comparison tells whoever watches it: rows, and within a row the phases of its build and evaluation."""

from typing import Protocol

from ..build.observer import BuildObserver, SilentObserver
from ..report.result import RecipeResult


class CompareObserver(BuildObserver, Protocol):
    """Receives the progress of a comparison; ``phase`` and ``progress`` are about the current row."""

    def row_started(self, name: str, number: int, total: int) -> None:
        """Row ``number`` of ``total`` (counted from 1) is measured now."""
        ...

    def row_finished(self, result: RecipeResult, *, is_reused: bool) -> None:
        """A row is done, or was taken over from an earlier run."""
        ...


class SilentCompareObserver(SilentObserver):
    """Watches and says nothing."""

    def row_started(self, name: str, number: int, total: int) -> None:
        """Ignore the row."""

    def row_finished(self, result: RecipeResult, *, is_reused: bool) -> None:
        """Ignore the result."""
