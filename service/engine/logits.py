"""What happens to one request's logits before its next token is chosen.

In this order: tokens that are not allowed are masked (allowed ids, bad words, a grammar, ends before ``min_tokens``),
then ``logit_bias`` is added, then come the penalties: repetition, frequency, presence. Masked tokens are at minus
infinity, where nothing that follows reaches them.

Counts are kept from token to token, so a step costs what the distinct tokens so far cost, not the whole text again.
Tokens are taken from the request's output as they appear there, one or several since the last call.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .request import SamplingParams

Logits: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float32]]"
Mask: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.bool_]]"
MASKED = -np.inf


class GrammarState(Protocol):
    """Where one text stands in its grammar."""

    @property
    def is_complete(self) -> bool:
        """The text is whole, and nothing may follow."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on; None: it can."""
        ...

    def allowed(self, num_tokens: int) -> Mask:
        """Which of ``num_tokens`` tokens may come next; the caller may write over it."""
        ...

    def advance(self, token_id: int) -> None:
        """``token_id`` came next."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by requests."""

    def start(self) -> GrammarState:
        """The beginning of a text."""
        ...


class TokenCounts:
    """The distinct tokens of a text and how often the output holds each; a token of the prompt alone counts zero."""

    def __init__(self, prompt_token_ids: Sequence[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._token_ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token_id in set(prompt_token_ids):
            self._place_of(token_id)

    def add(self, token_id: int) -> None:
        """The output got ``token_id``."""
        self._counts[self._place_of(token_id)] += 1

    def _place_of(self, token_id: int) -> int:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[place] = token_id
        return place

    def penalize(self, logits: Logits, repetition: float, frequency: float, presence: float) -> None:
        """Change ``logits`` (vocab_size,) in place."""
        token_ids, counts = self._token_ids[: len(self._places)], self._counts[: len(self._places)]
        values = logits[token_ids]
        if repetition != 1.0:
            values = np.where(values > 0.0, values / np.float32(repetition), values * np.float32(repetition))
        values -= np.float32(frequency) * counts
        values -= np.float32(presence) * (counts > 0.0)
        logits[token_ids] = values


class LogitsProcessor:
    """Changes the logits of one request, token after token.

    ending_token_ids: tokens that end its text, masked until ``params.min_tokens`` are there
    """

    def __init__(
        self, params: "SamplingParams", prompt_token_ids: Sequence[int], ending_token_ids: frozenset[int]
    ) -> None:
        self._params = params
        self._num_seen = 0
        self._ending = np.array(sorted(ending_token_ids), dtype=np.int64)
        self._allowed = np.array(params.allowed_token_ids, dtype=np.int64)
        self._biased = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._counts = None
        if params.has_penalties:
            self._counts = TokenCounts(prompt_token_ids if params.repetition_penalty != 1.0 else ())
        self._grammar = None if params.grammar is None else params.grammar.start()
        self.problem: str | None = None

    def is_complete(self, output_token_ids: Sequence[int]) -> bool:
        """The output so far is all that the grammar has."""
        if self._grammar is None:
            return False
        self._catch_up(output_token_ids)
        return self._grammar.is_complete

    def apply(self, logits: Logits, output_token_ids: Sequence[int]) -> None:
        """Change ``logits`` (vocab_size,) for the token after ``output_token_ids``, in place.

        Values that are not finite are left alone, for whoever chooses to see them. Where no token is left, all are
        masked and ``problem`` says why.
        """
        self._catch_up(output_token_ids)
        if not np.isfinite(logits.max()):
            return
        self._mask(logits, output_token_ids)
        if len(self._biased):
            logits[self._biased] += self._biases
        if self._counts is not None:
            params = self._params
            self._counts.penalize(logits, params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        if logits.max() == MASKED:
            self.problem = (self._grammar and self._grammar.problem) or "no token is left that it allows"

    def _catch_up(self, output_token_ids: Sequence[int]) -> None:
        for token_id in output_token_ids[self._num_seen :]:
            if self._counts is not None:
                self._counts.add(token_id)
            if self._grammar is not None:
                self._grammar.advance(token_id)
        self._num_seen = len(output_token_ids)

    def _mask(self, logits: Logits, output_token_ids: Sequence[int]) -> None:
        if len(self._allowed):
            kept = logits[self._allowed]
            logits.fill(MASKED)
            logits[self._allowed] = kept
        for *before, last in self._params.bad_words:
            if not before or list(output_token_ids[-len(before) :]) == before:
                logits[last] = MASKED
        is_too_early = len(output_token_ids) < self._params.min_tokens
        if self._grammar is not None:
            self._mask_by_grammar(self._grammar, logits, is_too_early)
        elif is_too_early:
            logits[self._ending] = MASKED

    def _mask_by_grammar(self, grammar: GrammarState, logits: Logits, is_too_early: bool) -> None:
        """A grammar's end comes before ``min_tokens`` where nothing else can follow."""
        allowed = grammar.allowed(len(logits))
        if is_too_early:
            ends = allowed[self._ending]
            allowed[self._ending] = False
            if not allowed.any():
                allowed[self._ending] = ends
        np.copyto(logits, MASKED, where=~allowed)
