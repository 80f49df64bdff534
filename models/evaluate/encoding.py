"""Text to the token ids that are scored, by the rules of lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Protocol

from ..errors import EvaluationError
from .scoring import Request


class TextTokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The marker before a text."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The markers that end a generation."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        ...


def prefix_token(tokenizer: TextTokenizer) -> int:
    """The token that stands before a text without context: BOS, else an EOS.

    Raises:
        EvaluationError: the tokenizer has neither.
    """
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if not tokenizer.eos_token_ids:
        raise EvaluationError(
            "the tokenizer has neither a BOS nor an EOS token: a text cannot be scored from its start"
        )
    return min(tokenizer.eos_token_ids)


def encode_text(tokenizer: TextTokenizer, text: str) -> list[int]:
    """``text`` between the markers that the model was trained with, unless it spells out the first one itself.

    Raises:
        EvaluationError: ``text`` holds what is no character.
    """
    has_marker = bool(text) and text.startswith(_prefix_text(tokenizer) or "\0")
    try:
        return tokenizer.encode(text, add_special_tokens=not has_marker)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> Request:
    """Token ids of ``continuation`` after ``context``.

    A tokenizer may merge characters across the boundary, and a model trained on text has seen them merged: both are
    encoded together and split at the length of the context's own encoding. Spaces at the context's end belong to the
    continuation's first token and move there. Without a context, ``prefix_token`` stands in for it.

    Raises:
        EvaluationError: nothing is left to score: the continuation is empty, or merges into the context's last token.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if kept:
        whole, num_context = encode_text(tokenizer, kept + continuation), len(encode_text(tokenizer, kept))
    else:
        whole = tokenizer.encode(continuation, add_special_tokens=False)
        has_marker = bool(whole) and whole[0] == prefix_token(tokenizer)
        whole, num_context = whole if has_marker else [prefix_token(tokenizer), *whole], 1
    if num_context >= len(whole):
        raise EvaluationError(f"{continuation!r} adds no token after {kept[-40:]!r}: change or leave out the row")
    return Request(tuple(whole[:num_context]), tuple(whole[num_context:]))


def _prefix_text(tokenizer: TextTokenizer) -> str:
    if tokenizer.bos_token_id is None and not tokenizer.eos_token_ids:
        return ""
    return tokenizer.decode([prefix_token(tokenizer)], skip_special_tokens=False)
