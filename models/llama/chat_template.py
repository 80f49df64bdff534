"""Chat templates: the Jinja programs that come with a tokenizer and turn messages into a prompt.

A template is somebody else's code, so it runs in Jinja's immutable sandbox. The names it can use are those that
transformers offers, since that is what templates are written against.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError


class _GenerationTag(Extension):
    """``{% generation %}``: marks what the assistant wrote, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Raises:
        CheckpointError: on construction, when ``source`` is not a valid template; ``where`` names it.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        self._where = where
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: the chat template is not valid (line {error.lineno}): {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        more_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for ``messages``; ``more_variables`` are those that a template has of its own.

        Raises:
            ValueError: the template rejects the messages; its own words are in the message.
            CheckpointError: the template tries what the sandbox forbids.
        """
        variables: dict[str, Any] = {**(more_variables or {}), "tools": None, "documents": None, **self._variables}
        try:
            return self._template.render(
                {
                    **variables,
                    "messages": [dict(message) for message in messages],
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except SecurityError as error:
            raise CheckpointError(f"{self._where}: the chat template tries what is not allowed: {error}") from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ValueError(f"the chat template rejects these messages: {error}") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
