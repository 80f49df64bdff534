"""Rows of the Hugging Face Hub's datasets, through the optional package ``datasets``."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvaluationError

LoadDataset = Callable[..., Iterable[Mapping[str, Any]]]
"""``datasets.load_dataset``, or what a test puts in its place."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """Which split of which dataset; ``options`` go to ``datasets.load_dataset`` as they are."""

    path: str
    config: str | None
    split: str
    options: Mapping[str, Any] = field(default_factory=dict)


def load_rows(
    source: HubSource, name: str, alternative: str, load_dataset: LoadDataset | None = None
) -> Iterable[Mapping[str, Any]]:
    """The rows of ``source``.

    Args:
        source: what to load.
        name: what the user asked for, for messages.
        alternative: what to do without a connection, for messages.
        load_dataset: in place of ``datasets.load_dataset``.

    Raises:
        EvaluationError: the package is missing, or the Hub cannot be reached.
    """
    if load_dataset is None:
        try:
            import datasets
        except ImportError as error:
            raise EvaluationError(
                f"{name}: needs the package datasets: pip install 'qerve[data]'. Or {alternative}"
            ) from error
        load: LoadDataset = datasets.load_dataset
    else:
        load = load_dataset
    try:
        return load(source.path, source.config, split=source.split, **source.options)
    except Exception as error:  # the client lets through the errors of whichever HTTP library it is built on
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise EvaluationError(
            f"{name}: the dataset {source.path} cannot be loaded from the Hugging Face Hub: {reason}. "
            f"Offline? {alternative[:1].upper()}{alternative[1:]}"
        ) from error
