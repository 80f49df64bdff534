"""Options of the methods: what ``ReconstructConfig.options`` may hold, checked before any weight is read."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from pydantic import with_config

from ..config import ReconstructConfig
from ..errors import SchemeError
from ..plain import from_plain
from ..scheme import STRICT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class NoOptions:
    """Of a method that leaves nothing to choose beside the rank and the factor dtype."""


def parse_options(config: ReconstructConfig, cls: type[_T]) -> _T:
    """The options of ``config`` as the frozen dataclass ``cls`` that its method declares.

    Raises:
        SchemeError: an unknown option, a wrong type or a value out of range; names the method, the option and what
            can be chosen.
    """
    known = [field.name for field in fields(cls)]
    for name in config.options:
        if name not in known:
            choices = f"choose from {', '.join(known)}" if known else "it takes no options"
            raise SchemeError(f"method {config.method} has no option {name!r}; {choices}")
    return from_plain(cls, config.options, f"options of method {config.method}")
