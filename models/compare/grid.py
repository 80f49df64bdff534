"""A grid of recipes: the Cartesian product of its axes, with names that say what each point is."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pydantic import with_config

from ..config import BuildConfig
from ..errors import SchemeError
from ..scheme import PER_CHANNEL, STRICT
from .overlay import lookup, nested, overlay

_PREFIXES = {
    "scheme.num_bits": "w",
    "scheme.group_size": "g",
    "activations.num_bits": "a",
    "attention.num_bits": "qkv",
    "reconstruct.rank": "r",
    "budget.target_bits": "b",
}
_BARE = frozenset({"method", "format", "rotation", "objective", "exponent", "factor_dtype", "source", "inputs"})
"""Settings whose values speak for themselves."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class GridConfig:
    """Recipes for every combination of the axes' values.

    axes:          by dotted path (``"scheme.num_bits"``): the values; one may be a table, laid over what is there
    exclude:       combinations to leave out: by dotted path, values that all have to match
    name_template: with places such as ``{scheme.num_bits}``; empty: the values in the order of the axes
    name_prefix:   in front of automatic names
    values:        fixed values of the build configuration, laid over the comparison's base
    """

    axes: dict[str, list[Any]]
    exclude: list[dict[str, Any]] = field(default_factory=list)
    name_template: str = ""
    name_prefix: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, values in self.axes.items():
            if not values:
                raise SchemeError(f"grid axis {path!r} has no values")
        if unknown := {path for item in self.exclude for path in item} - self.axes.keys():
            raise SchemeError(f"grid exclude names {sorted(unknown)}, which are no axes; choose of {sorted(self.axes)}")
        if not self.axes:
            raise SchemeError("a grid needs axes; a single recipe goes under [[recipes]]")


def expand(grid: GridConfig, base: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and build configuration (plain) of every point, the last axis varying fastest.

    Raises:
        SchemeError: the name template asks for what is not there, or a point is no build configuration.
    """
    fixed = overlay(base, grid.values)
    for combination in product(*grid.axes.values()):
        point = dict(zip(grid.axes, combination, strict=True))
        if any(all(point[path] == value for path, value in item.items()) for item in grid.exclude):
            continue
        values = fixed
        for path, value in point.items():
            values = overlay(values, nested(path, value))
        yield _name(grid, point, values, where), values


def _name(grid: GridConfig, point: Mapping[str, Any], values: Mapping[str, Any], where: str) -> str:
    automatic = "-".join([*filter(None, [grid.name_prefix]), *(automatic_name(*item) for item in point.items())])
    if not grid.name_template:
        return automatic
    complete = BuildConfig.from_dict(dict(values), f"{where}: {automatic}").to_dict()

    def fill(match: re.Match[str]) -> str:
        path = match.group(1)
        return _word(point[path] if path in point else lookup(complete, path, f"{where}: name_template"))

    return re.sub(r"\{([^{}]*)\}", fill, grid.name_template)


def automatic_name(path: str, value: object) -> str:
    """How a recipe's name mentions one value: ``w4``, ``g64``, ``r16``, ``qera-exact``, ``no-refit``."""
    section, _, last = path.rpartition(".")
    plain = last.removeprefix("use_").removeprefix("is_").replace("_", "-")
    if path == "scheme.group_size" and value == PER_CHANNEL:
        return "per-row"
    if path in _PREFIXES:
        return _PREFIXES[path] + _word(value)
    if isinstance(value, bool):
        return plain if value else f"no-{plain}"
    if isinstance(value, Mapping):
        inner = [automatic_name(f"{path}.{name}", item) for name, item in value.items()]
        return "-".join(inner) or f"{plain}-default"
    if value is None or (last in _BARE and value == "none"):
        return f"no-{section.rpartition('.')[2] if last == 'method' else plain}"
    return _word(value) if last in _BARE else f"{plain}{_word(value)}"


def _word(value: object) -> str:
    """``value`` with the characters that a name may have."""
    if isinstance(value, int | float):  # with its sign: a group size of -1 is not one of 1
        return f"{value:g}" if isinstance(value, float) else str(value)
    text = str(value)
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).strip("-") or "x"
