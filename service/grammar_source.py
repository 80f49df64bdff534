"""Grammars as clients write them, what is refused of them before they are compiled, and their limits."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import llguidance

MAX_MULTIPLES = 10_000
"""Product of all ``multipleOf`` of a schema, without their powers of ten: so many states has an automaton that counts
to all of them, and the library does not limit the time that it takes to build one."""
MAX_WHITESPACE = 16
"""Between two parts of a JSON text: a model that is unsure writes spaces for ever."""


class BadGrammarError(ValueError):
    """The grammar cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as a client wrote it.

    kind: of ``text``; ``json`` is a JSON schema in JSON, ``choice`` a list of texts in JSON
    """

    kind: Literal["json", "regex", "choice", "lark"]
    text: str


def definition_of(source: GrammarSource) -> str:
    """``source`` as llguidance reads it."""
    if source.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source.text)
    if source.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(source.text)
    value = json.loads(source.text)
    if source.kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(item) for item in value))
    if not isinstance(value, dict):
        raise BadGrammarError("a schema is an object")
    value.pop("x-guidance", None)  # options of the library, which are ours to set
    _check_schema(value)
    return llguidance.LLMatcher.grammar_from_json_schema(
        value,
        overrides={
            "whitespace_pattern": rf"[ \n\t]{{1,{MAX_WHITESPACE}}}",
            "lenient": False,
            "coerce_one_of": False,
        },
    )


def limits_for(source: GrammarSource) -> llguidance.LLParserLimits:
    """Less for grammars that may be read in many ways at once, whose work grows with the square of the items."""
    is_ambiguous = source.kind == "lark"
    return llguidance.LLParserLimits(
        step_max_items=2_000 if is_ambiguous else 5_000,
        max_items_in_row=200 if is_ambiguous else 2_000,
        step_lexer_fuel=50_000,
        initial_lexer_fuel=1_000_000,
        max_lexer_states=25_000,  # per request: some 50 MB at worst
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in ``value``, without recursion."""
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, dict):
            yield item
            values += item.values()
        elif isinstance(item, list):
            values += item


def _check_schema(schema: dict[str, Any]) -> None:
    """What the library does not look at, or says less well."""
    product = 1
    for part in _objects(schema):
        reference, multiple = part.get("$ref"), part.get("multipleOf")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise BadGrammarError(f"$ref {reference[:64]!r} points outside the schema; only '#...' is followed")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            product *= int("".join(map(str, Decimal(str(multiple)).normalize().as_tuple().digits)))
        if product > MAX_MULTIPLES:
            raise BadGrammarError(f"the values of multipleOf multiply to more than {MAX_MULTIPLES}")
