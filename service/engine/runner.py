"""One forward pass over the scheduled requests: from requests to numbers, and logits back."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.llama.batch import SequenceSpan, TokenBatch
from models.llama.network import KVCache

from .block_manager import BLOCK_SIZE
from .request import Request
from .scheduler import ScheduledRequest


class ServedModel(Protocol):
    """What the engine needs of a network."""

    @property
    def device(self) -> torch.device:
        """Where cache slots must be."""
        ...

    # Any: a network takes the caches that it makes itself.
    def step(self, tokens: TokenBatch, kv_cache: Any) -> Tensor | None:
        """Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``, maybe only until the next step."""
        ...


class Runner:
    """Runs the network against its key-value cache."""

    def __init__(self, model: ServedModel, kv_cache: KVCache, block_size: int = BLOCK_SIZE) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._slots: dict[Request, Tensor] = {}

    def run(self, scheduled: Sequence[ScheduledRequest]) -> Tensor | None:
        """Logits (n, vocab_size) float32 for the next token of the n requests that get one; None where none does.

        The next call may write over them.
        """
        return self._model.step(self._tokens(scheduled), self._kv_cache)

    def _tokens(self, scheduled: Sequence[ScheduledRequest]) -> TokenBatch:
        """The step, with logits of the last known token of every request that gets its next one."""
        tokens = TokenBatch([], [], [])
        if not self._kv_cache.has_block_tables:
            self._slots = {item.request: self._slots_of(item.request) for item in scheduled}
        for request, num_new, gets_token in scheduled:
            computed = request.num_computed_tokens
            context_len = computed + num_new
            slots = self._slots[request][:context_len] if self._slots else None
            tokens.spans.append(SequenceSpan(len(tokens.token_ids), num_new, context_len, slots, request.block_table))
            tokens.token_ids.extend(request.tokens_between(computed, context_len))
            if gets_token:
                tokens.logit_rows.append(len(tokens.token_ids) - 1)
        return tokens

    def _slots_of(self, request: Request) -> Tensor:
        """Cache slots of all the blocks of ``request``: worked out in its first step, kept from each step to the next.

        A request in two steps in a row has the same blocks in both.
        """
        slots = self._slots.get(request)
        if slots is None:
            blocks = torch.tensor(request.block_table, dtype=torch.int64)
            slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
            slots = slots.to(self._model.device)
        return slots
