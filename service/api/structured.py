"""Which grammar a request's text has to keep to: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and
``guided_*``."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..deps import Context
from ..engine.logits import Grammar
from ..errors import bad_request
from ..grammar import BadGrammarError, GrammarSource

MAX_GRAMMAR_CHARS = 64 << 10
MAX_GUIDED_CHOICES = 1024

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Schema = dict[str, Any]
ChoiceTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=MAX_GUIDED_CHOICES)
]
ANY_OBJECT: Schema = {"type": "object"}
Kind = Literal["json", "regex", "choice", "lark"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "lark")


class JsonSchemaFormat(BaseModel):
    """OpenAI's wrapping of a schema; ``strict`` changes nothing: a schema is always kept to."""

    model_config = ConfigDict(strict=True, extra="ignore")
    name: Annotated[str, Field(max_length=256)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """``response_format``; a ``schema`` beside ``json_object`` is llama-server's spelling."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(default=None, alias="schema")


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``: one of its fields."""

    model_config = ConfigDict(strict=True, extra="forbid")
    json_: Schema | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: Literal[True] | None = None


class StructuredFields(BaseModel):
    """The fields of a body that ask for a grammar; at most one may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: GrammarText | None = None

    def grammar_source(self) -> tuple[str, GrammarSource] | None:
        """The grammar that is asked for, and the name of the field that asks; None: any text will do.

        Raises:
            ApiError: 400, more than one, or a format without its schema.
        """
        sources = [("response_format", source) for source in _from_format(self.response_format)]
        sources += [("structured_outputs", source) for source in _from_structured(self.structured_outputs)]
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        sources += [(name, source) for name, source in zip(names, map(_source, KINDS, guided), strict=True) if source]
        if len(sources) > 1:
            given = ", ".join(name for name, _ in sources)
            raise bad_request(f"More than one grammar is asked for, by {given}; give one.", sources[1][0])
        return sources[0] if sources else None


async def grammar_for(context: Context, body: StructuredFields) -> Grammar | None:
    """The compiled grammar of ``body``; None: it asks for none.

    Raises:
        ApiError: 400, the grammar cannot be used.
    """
    found = body.grammar_source()
    if found is None:
        return None
    param, source = found
    try:
        return await context.grammars.compile(source)
    except BadGrammarError as error:
        context.metrics.rejected("bad_grammar")
        raise bad_request(f"{param}: the grammar cannot be used: {error}.", param) from None


def _from_format(response_format: ResponseFormat | None) -> list[GrammarSource]:
    if response_format is None or response_format.type == "text":
        return []
    if response_format.type == "json_object":
        return _sources(response_format.schema_ or ANY_OBJECT)
    if response_format.json_schema is None:
        raise bad_request("response_format: json_schema is missing.", "response_format")
    return _sources(response_format.json_schema.schema_)


def _from_structured(fields: StructuredOutputs | None) -> list[GrammarSource]:
    if fields is None:
        return []
    schema = fields.json_ if fields.json_ is not None else ANY_OBJECT if fields.json_object else None
    return _sources(schema, fields.regex, fields.choice, fields.grammar)


def _sources(*values: Any) -> list[GrammarSource]:
    """Of a schema, a regular expression, choices and a Lark grammar, those that are given."""
    return [source for kind, value in zip(KINDS, values, strict=False) if (source := _source(kind, value))]


def _source(kind: Kind, value: Any) -> GrammarSource | None:
    if value is None:
        return None
    return GrammarSource(kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
