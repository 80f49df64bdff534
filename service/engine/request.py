"""One sequence to generate: its tokens, how to sample them, and how far it has come. No tensors here."""

import random
from dataclasses import dataclass, field
from enum import StrEnum

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
    stop:   text at which generation ends; it is not part of the output
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_filter(self) -> bool:
        """Some tokens are excluded before drawing."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(slots=True, eq=False)
class Request:
    """One sequence from admission to its last token.

    score_from:          first prompt token that is still to be scored, if the prompt is; the very first never is, as it
                         has nothing to follow from
    cache_salt:          requests share cached prefixes only with those of the same one
    block_table:         cache blocks it holds, in the order of its tokens
    block_keys:          what its leading full blocks are found by, as far as that was asked for
    num_computed_tokens: leading tokens whose keys and values are in the cache
    num_cached_tokens:   prompt tokens that were in the cache when it first ran
    *_seconds:           times on the engine's clock
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_seconds: float = 0.0
    score_from: int = 1
    cache_salt: str = ""
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
        return self.wants_tokens and not self.is_scored

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
        return self.num_prompt_tokens + self.num_output_tokens

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

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Known tokens ``start .. end``, counted over prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - num_prompt)]
