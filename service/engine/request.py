"""One sequence to generate: its tokens, how to sample them, and how far it has come. No tensors here."""

import random
from dataclasses import dataclass, field
from enum import StrEnum

from .logits import Grammar, LogitsProcessor

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them says nothing more and may overflow."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    max_tokens: tokens to generate; 0: the prompt is computed, and scored if that is asked for, and that is all
    num_prompt_logprobs: score the prompt, with so many of the likeliest tokens at each place; None: do not
    top_k:  keep the k most likely tokens; 0: all
    top_p:  of those, keep the fewest that hold this share of the probability
    min_p:  before both, drop tokens less likely than this fraction of the most likely one
    seed:   the same seed gives the same text, whatever else is in the batch; None: never the same
    stop:   text at which generation ends
    stop_token_ids:       tokens that end generation, besides those that end a text
    includes_stop:        what ended generation, text or token, is part of the output
    ignore_eos:           tokens that end a text do not end generation
    min_tokens:           so many tokens come before one that ends generation may
    presence_penalty:     off the logit of every token in the output
    frequency_penalty:    off it again for each time that the token is there
    repetition_penalty:   divides positive and multiplies negative logits of tokens in prompt or output; 1: neither
    logit_bias:           (token id, what is added to its logit)
    allowed_token_ids:    no others are generated; empty: all may be
    bad_words:            sequences of token ids, none of which is completed
    grammar:              the text keeps to it and ends with it
    num_logprobs:         with each token, its log-probability and those of so many of the most likely; None: none
    skips_special_tokens: control tokens leave no text
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    includes_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    skips_special_tokens: bool = True

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_filter(self) -> bool:
        """Some tokens are excluded before drawing."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalties(self) -> bool:
        """Tokens are less likely for having come before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def masks_tokens(self) -> bool:
        """Some tokens may not come next."""
        masks = self.allowed_token_ids or self.bad_words or self.min_tokens > 0
        return bool(masks) or self.grammar is not None

    @property
    def changes_logits(self) -> bool:
        """The next token is not chosen from the model's logits as they are."""
        return self.masks_tokens or self.has_penalties or bool(self.logit_bias)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence from admission to its last token.

    score_from:          first prompt token that is still to be scored, if the prompt is; the very first never is, as it
                         has nothing to follow from
    cache_salt:          requests share cached prefixes only with those of the same one, and of the same rank
    is_background:       nobody waits for it: small steps, none of what it computed is found by others or counted
    rank:                leading components of every correction that it gets; None: all
    block_table:         cache blocks it holds, in the order of its tokens
    block_keys:          what its leading full blocks are found by, as far as that was asked for
    num_computed_tokens: leading tokens whose keys and values are in the cache
    num_cached_tokens:   prompt tokens that were in the cache when it first ran
    ending_token_ids:    tokens that end it, once the engine has it
    logits_processor:    changes its logits before each token is chosen; None: nothing does
    *_seconds:           times on the engine's clock
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_seconds: float = 0.0
    score_from: int = 1
    cache_salt: str = ""
    rank: int | None = None
    is_background: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    scheduled_seconds: float | None = None
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    finished_seconds: float | None = None
    ending_token_ids: frozenset[int] = frozenset()
    logits_processor: LogitsProcessor | None = None
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.params.seed)  # noqa: S311 draws tokens, not secrets

    @property
    def is_scored(self) -> bool:
        """Prompt tokens get log-probabilities."""
        return self.params.num_prompt_logprobs is not None

    @property
    def wants_tokens(self) -> bool:
        """Something is to be generated."""
        return self.params.max_tokens > 0

    @property
    def can_speculate(self) -> bool:
        """Each of its tokens is sampled from the logits as they are, so that rows beyond the next one can be used."""
        return self.wants_tokens and not self.is_scored and self.logits_processor is None

    @property
    def num_cacheable_tokens(self) -> int:
        """Leading tokens that need not be computed when their keys and values are at hand.

        The last one has to be, for the logits of the next; so has whatever a scored token follows on.
        """
        is_to_be_scored = self.is_scored and self.score_from < self.num_prompt_tokens
        return (self.score_from if is_to_be_scored else self.num_tokens) - 1

    def scored_between(self, start: int, end: int) -> range:
        """Prompt tokens whose log-probabilities tokens ``start .. end`` give: those that follow on them."""
        if not self.is_scored:
            return range(0)
        return range(max(start + 1, self.score_from), min(end + 1, self.num_prompt_tokens))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens it can ever hold: what the cache as a whole must have room for."""
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that are still to be computed: what is left of the prompt, then the newest token."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Only its last known token is to be computed: while it runs, every step gives the next one."""
        return self.num_uncomputed_tokens == 1

    @property
    def is_prompt_computed(self) -> bool:
        """The cache holds the whole prompt: from here on every step gives a token."""
        return self.num_computed_tokens >= len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        """No more tokens will come."""
        return self.finish_reason is not None

    def is_hidden(self, token_id: int) -> bool:
        """``token_id`` ends the output and leaves no text in it."""
        return token_id in self.ending_token_ids and not self.params.includes_stop

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Known tokens ``start .. end``, counted over prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - num_prompt)]
