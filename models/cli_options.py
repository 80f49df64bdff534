"""From command-line options to configuration objects."""

from pathlib import Path
from typing import Any

from .config import BuildConfig
from .errors import EvaluationError


def build_config(path: Path | None, **sections: dict[str, Any]) -> BuildConfig:
    """The configuration in ``path`` (or the defaults) with every option that is not None laid over it.

    Raises:
        SchemeError: unknown key, wrong type, value out of range.
    """
    base = BuildConfig() if path is None else BuildConfig.read(path)
    values = base.to_dict()
    for section, options in sections.items():
        values[section] |= {name: value for name, value in options.items() if value is not None}
    return BuildConfig.from_dict(values, "command line")


def read_text(path: Path) -> str:
    """The text of ``path``.

    Raises:
        EvaluationError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
