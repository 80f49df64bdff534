"""Plain nested values laid over others."""

from collections.abc import Mapping
from typing import Any

from ..errors import SchemeError


def overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` laid over it, table by table; neither is changed.

    A ``reconstruct`` that names another method than the base's does not inherit its options: they belong to a method.
    """
    merged = dict(base)
    for name, value in values.items():
        former = merged.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            is_other_method = "method" in value and value["method"] != former.get("method", value["method"])
            kept = {key: item for key, item in former.items() if not (is_other_method and key == "options")}
            merged[name] = overlay(kept, value)
        else:
            merged[name] = value
    return merged


def nested(path: str, value: object) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the dotted ``path`` a.b."""
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


def lookup(values: Mapping[str, Any], path: str, where: str) -> object:
    """The value at the dotted ``path``.

    Raises:
        SchemeError: there is none; ``where`` says who asks.
    """
    found: Any = values
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise SchemeError(f"{where}: there is no {path!r} in a build configuration")
        found = found[part]
    return found
