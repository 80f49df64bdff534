"""Grammars that generated text keeps to: JSON schemas, regular expressions and Lark grammars, by llguidance.

A grammar is somebody else's program. It is compiled outside the engine's loop, in a thread of its own, with a limit on
its size and on the time that a request waits for it; what it may then do per token is limited by numbers of parser
items and lexer steps, not by a clock, so that a text does not depend on how busy the machine is. A grammar that runs
into such a limit ends its own request.
"""

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import llguidance
import numpy as np

from .engine.logits import Grammar, GrammarState, Mask

MAX_GRAMMAR_BYTES = 64 << 10
MAX_CACHED = 64
COMPILE_SECONDS = 5.0
MAX_MULTIPLES = 10_000
"""Product of all ``multipleOf`` of a schema, without their powers of ten: so many states has an automaton that counts
to all of them, and the library does not limit the time that it takes to build one."""
MAX_ABANDONED = 2
"""Threads that may still compile what nobody waits for any more."""
MAX_MESSAGE_CHARS = 400

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


class CompiledGrammar:
    """A grammar for one tokenizer."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        """See ``Grammar``."""
        return MatcherState(self._matcher.deep_copy())


class MatcherState:
    """See ``GrammarState``."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """See ``GrammarState``."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def problem(self) -> str | None:
        """See ``GrammarState``."""
        return f"the grammar cannot go on: {_reason(self._matcher)}" if self._matcher.is_error() else None

    def allowed(self, num_tokens: int) -> Mask:
        """See ``GrammarState``."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.zeros(num_tokens, dtype=np.bool_)
        return np.unpackbits(bits, count=num_tokens, bitorder="little").view(np.bool_)

    def advance(self, token_id: int) -> None:
        """See ``GrammarState``."""
        self._matcher.consume_token(token_id)


class GrammarCompiler:
    """Compiles grammars for one model, and remembers the latest.

    tokenizer_json: gives the content of ``tokenizer.json``; called once, with the first grammar
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        eos_token_ids: frozenset[int],
        vocab_size: int,
        seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._grammars: OrderedDict[GrammarSource, Grammar] = OrderedDict()
        # One at a time: grammars are rare, and those that take long must not take every processor.
        self._turn = asyncio.Semaphore(1)
        self._abandoned: set[threading.Thread] = set()

    async def compile(self, source: GrammarSource) -> Grammar:
        """``source``, compiled or remembered.

        Raises:
            BadGrammarError: it is not valid, not supported, too large, or takes too long.
        """
        grammar = self._grammars.get(source)
        if grammar is None:
            grammar = await self._in_time(source)
        self._grammars[source] = grammar
        self._grammars.move_to_end(source)
        if len(self._grammars) > MAX_CACHED:
            self._grammars.popitem(last=False)
        return grammar

    async def _in_time(self, source: GrammarSource) -> Grammar:
        num_bytes = len(source.text.encode())
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise BadGrammarError(f"it has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES}")
        try:
            async with asyncio.timeout(self._seconds), self._turn:
                return await self._in_thread(source)
        except TimeoutError:
            raise BadGrammarError(f"it was not compiled within {self._seconds:g} s; simplify it") from None

    async def _in_thread(self, source: GrammarSource) -> Grammar:
        """In a thread that is left to itself when its time is up, since nothing can stop it."""
        self._abandoned = {thread for thread in self._abandoned if thread.is_alive()}
        if len(self._abandoned) >= MAX_ABANDONED:
            raise BadGrammarError("grammars that take too long are still being compiled; try again later")
        result: Future[Grammar] = Future()
        thread = threading.Thread(target=self._run, args=(source, result), name="qerve-grammar", daemon=True)
        thread.start()
        try:
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            self._abandoned.add(thread)
            raise

    def _run(self, source: GrammarSource, result: "Future[Grammar]") -> None:
        try:
            grammar = self._compile(source)
        except BaseException as error:
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
        else:
            if result.set_running_or_notify_cancel():
                result.set_result(grammar)

    def _compile(self, source: GrammarSource) -> Grammar:
        if self._tokenizer is None:
            self._tokenizer = self._new_tokenizer()
        matcher = llguidance.LLMatcher(self._tokenizer, _definition(source), log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask of a grammar takes the longest
        if matcher.is_error():
            raise BadGrammarError(_reason(matcher))
        return CompiledGrammar(matcher)

    def _new_tokenizer(self) -> llguidance.LLTokenizer:
        if not self._eos_token_ids:
            raise BadGrammarError("the model has no token that ends a text, so no grammar could end one")
        try:
            return llguidance.LLTokenizer(
                self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        except ValueError as error:
            raise BadGrammarError(f"the model's tokenizer cannot be used for grammars: {error}") from error


def _definition(source: GrammarSource) -> str:
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


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        step_max_items=10_000,  # per token: some 20 ms at worst
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


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The library's words, without its dump of the parser."""
    message = matcher.get_error().split("\n<", 1)[0].strip()
    return message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."
