"""Plain values: from files of JSON or TOML into frozen dataclasses, and back to JSON."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import SchemeError

_T = TypeVar("_T")


def from_plain(cls: type[_T], values: object, where: str) -> _T:
    """``values`` (of JSON or TOML) as the frozen dataclass ``cls``.

    Raises:
        SchemeError: an unknown key, a wrong type or a value out of range, with its place in ``where``.
    """
    try:
        # As JSON, because strict validation takes a dict for a dataclass only there.
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except SchemeError as error:
        raise SchemeError(f"{where}: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors())
        raise SchemeError(f"{where}: {problems}") from error
    except (TypeError, ValueError) as error:
        raise SchemeError(f"{where}: holds a value that is not plain data: {error}") from error


def read_plain(path: Path) -> object:
    """The content of ``path`` (.toml or .json).

    Raises:
        SchemeError: it is missing or not well formed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise SchemeError(f"{path}: cannot be read as a configuration: {error}") from error


def finite(values: Any) -> Any:
    """``values`` (nested dicts, lists, tuples) with None in place of what is not a finite number: JSON has no NaN."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
