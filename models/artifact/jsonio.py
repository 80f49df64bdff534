"""JSON of the artifact: one spelling when written, nothing ambiguous when read; and the error that names a file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ArtifactError


def damaged(file: Path, problem: str, tensor: str | None = None) -> ArtifactError:
    """The error for ``problem`` in ``file`` (and in ``tensor``), with what to do about it.

    Names that come from the file itself are untrusted: pass them through ``repr`` first.
    """
    where = f"{file}: " if tensor is None else f"{file}: tensor {tensor}: "
    return ArtifactError(f"{where}{problem}; the artifact is damaged: copy or download it again, or rebuild it")


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings in one line: its place, spelled safely, and what is wrong."""
    finding = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, finding['loc']))!r}: {finding['msg']}"


def canonical_json(values: object) -> bytes:
    """The spelling that is hashed: sorted keys, no blanks, UTF-8.

    Raises:
        ValueError: NaN, an infinity or a lone surrogate, which JSON cannot hold.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def readable_json(values: object) -> bytes:
    """The spelling that is written to files: sorted keys, two blanks of indentation, a newline at the end.

    Raises:
        ValueError: NaN, an infinity or a lone surrogate, which JSON cannot hold.
    """
    text = json.dumps(values, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def tabular_json(values: Mapping[str, object]) -> bytes:
    """The spelling of the manifest: sorted keys, a line per entry of every table, a table being an object of objects.

    For a file of thousands of records it is quick to write, to compare and to search by line.

    Raises:
        ValueError: NaN, an infinity or a lone surrogate, which JSON cannot hold.
    """
    lines = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
            entries = [canonical_json(key) + b":" + canonical_json(entry) for key, entry in sorted(value.items())]
            lines.append(canonical_json(name) + b":{\n" + b",\n".join(entries) + b"\n}")
        else:
            lines.append(canonical_json(name) + b":" + canonical_json(value))
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def parse_json_object(data: bytes, file: Path, part: str = "the file") -> dict[str, Any]:
    """Parse an object; duplicate keys, NaN and numbers beyond float64 are refused, not resolved silently.

    Raises:
        ArtifactError: not UTF-8, not JSON, nested too deep, ambiguous, or not an object.
    """
    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise damaged(file, f"{part} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise damaged(file, f"{part} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise damaged(file, f"{part} is not a JSON object")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of float64")
    return number
