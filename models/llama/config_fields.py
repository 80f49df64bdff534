"""Typed reading of the JSON-like settings of a checkpoint, with errors that name the file and the key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file is missing, is not UTF-8 or JSON, or holds something else than an object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; a checkpoint needs it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; ``where`` names it in the CheckpointError when it is none."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(values).__name__} instead of an object")
    return values


class ConfigFields:
    """Settings by key. An absent key and a null value are the same, as in Hugging Face configurations."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer from ``least`` to ``most``; without ``default`` the key is required."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        if not least <= value <= most:
            raise self._wrong(key, value, f"an integer from {least} to {most}")
        return value

    def optional_integer(self, key: str, least: int = 0) -> int | None:
        """An integer of ``least`` or more, or None."""
        return None if self.get(key) is None else self.integer(key, least=least)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number; without ``default`` the key is required."""
        value = self._present(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One integer or a list of integers, as a tuple; empty when absent."""
        value = self.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self._wrong(key, value, "a token id or a list of token ids")
        return tuple(items)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; empty when absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return value or {}

    def _present(self, key: str, default: object) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: {key!r} is missing")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key!r} is {value!r:.80}, expected {expected}")
