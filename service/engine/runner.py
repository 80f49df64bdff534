"""One forward pass over the scheduled requests: from requests to numbers, logits and scores back."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models.llama.batch import Batch, SequenceSpan, TokenBatch
from models.llama.network import KVCache

from .block_manager import BLOCK_SIZE
from .logprobs import TokenLogprobs, score_rows
from .request import Request
from .scheduler import ScheduledRequest


class ServedModel(Protocol):
    """What the engine needs of a network."""

    @property
    def device(self) -> torch.device:
        """Where cache slots must be."""
        ...

    # Any: a network takes the caches that it makes itself.
    def __call__(self, batch: Batch, kv_cache: Any = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) that ``logits`` takes."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        ...

    def step(self, tokens: TokenBatch, kv_cache: Any) -> Tensor | None:
        """Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``, maybe only until the next step."""
        ...


class StepResult(NamedTuple):
    """What a forward pass gives.

    logits:        (n, vocab_size) float32 for the next token of each request that gets one, and for those after each
                   token of its draft; None where no request gets any. The next pass may write over them
    prompt_scores: of the prompt tokens that follow on those computed, for requests that are scored
    """

    logits: Tensor | None
    prompt_scores: dict[Request, list[TokenLogprobs]]


class Runner:
    """Runs the network against its key-value cache."""

    def __init__(self, model: ServedModel, kv_cache: KVCache, block_size: int = BLOCK_SIZE) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._slots: dict[Request, _Slots] = {}

    def run(self, scheduled: Sequence[ScheduledRequest]) -> StepResult:
        """One step of all of ``scheduled``."""
        tokens = self._tokens(scheduled)
        if not any(item.request.is_scored for item in scheduled):
            return StepResult(self._model.step(tokens, self._kv_cache), {})
        return self._run_and_score(scheduled, tokens)

    @torch.inference_mode()
    def _run_and_score(self, scheduled: Sequence[ScheduledRequest], tokens: TokenBatch) -> StepResult:
        batch, logit_rows = tokens.tensors(self._model.device)
        hidden = self._model(batch, self._kv_cache)
        logits = self._model.logits(hidden[logit_rows]) if tokens.logit_rows else None
        scores = {}
        for item, span in zip(scheduled, tokens.spans, strict=True):
            request, first = item.request, item.request.num_computed_tokens
            scored = request.scored_between(first, first + item.num_tokens)
            if scored:
                rows = slice(span.start + scored.start - 1 - first, span.start + scored.stop - 1 - first)
                token_ids = request.prompt_token_ids[scored.start : scored.stop]
                scores[request] = score_rows(
                    self._model.logits, hidden[rows], token_ids, request.params.num_prompt_logprobs or 0
                )
        return StepResult(logits, scores)

    def _tokens(self, scheduled: Sequence[ScheduledRequest]) -> TokenBatch:
        """The step, with logits of the last known token of every request that gets its next one, and of its draft."""
        tokens = TokenBatch([], [], [])
        if not self._kv_cache.has_block_tables:
            self._slots = {item.request: self._slots_of(item.request) for item in scheduled}
        for request, num_new, gets_token, draft in scheduled:
            computed = request.num_computed_tokens
            context_len = computed + num_new
            slots = self._slots[request].slots[:context_len] if self._slots else None
            tokens.spans.append(SequenceSpan(len(tokens.token_ids), num_new, context_len, slots, request.block_table))
            tokens.token_ids.extend(request.tokens_between(computed, context_len))
            tokens.token_ids.extend(draft)
            if gets_token:
                num_rows = len(tokens.token_ids)
                tokens.logit_rows.extend(range(num_rows - 1 - len(draft), num_rows))
        return tokens

    def _slots_of(self, request: Request) -> "_Slots":
        """Cache slots of all the blocks of ``request``, kept from each step to the next until its blocks change."""
        kept = self._slots.get(request)
        if kept is not None and kept.block_table == request.block_table:
            return kept
        blocks = torch.tensor(request.block_table, dtype=torch.int64)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        return _Slots(request.block_table.copy(), slots.to(self._model.device))


class _Slots(NamedTuple):
    """slots: (num_blocks * block_size,) int64, those of ``block_table`` in its order."""

    block_table: list[int]
    slots: Tensor
