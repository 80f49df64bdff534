"""One forward pass over the scheduled requests: from requests to tensors and back to logits."""

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.llama.batch import Batch, SequenceSpan
from models.llama.network import KVCache

from .block_manager import BLOCK_SIZE
from .request import Request
from .scheduler import ScheduledRequest


class ServedModel(Protocol):
    """What the engine needs of a network."""

    @property
    def device(self) -> torch.device:
        """Where the batch must be."""
        ...

    # Any: a network takes the caches that it makes itself.
    def __call__(self, batch: Batch, kv_cache: Any = None) -> Tensor:
        """Final hidden states (num_tokens, hidden_size)."""
        ...

    def logits_at(self, batch: Batch, rows: Tensor, kv_cache: Any) -> Tensor:
        """The same pass; logits (n, vocab_size) float32 of its ``rows`` (n,) int64, maybe only until the next call."""
        ...


class Runner:
    """Runs the network against its key-value cache."""

    def __init__(self, model: ServedModel, kv_cache: KVCache, block_size: int = BLOCK_SIZE) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._slots: dict[Request, Tensor] = {}

    @torch.inference_mode()
    def run(self, scheduled: Sequence[ScheduledRequest]) -> Tensor | None:
        """Logits (n, vocab_size) float32 for the next token of the n requests that get one; None where none does.

        The next call may write over them.
        """
        batch, rows = self._batch(scheduled)
        if len(rows):
            return self._model.logits_at(batch, rows, self._kv_cache)
        self._model(batch, self._kv_cache)
        return None

    def _batch(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Batch, Tensor]:
        """The batch, and the rows of it (n,) int64 that the next tokens are read from."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans: list[SequenceSpan] = []
        if not self._kv_cache.has_block_tables:
            self._slots = {item.request: self._slots_of(item.request) for item in scheduled}
        for request, num_new, gets_token in scheduled:
            computed = request.num_computed_tokens
            context_len = computed + num_new
            slots = self._slots[request][:context_len] if self._slots else None
            spans.append(SequenceSpan(len(token_ids), num_new, context_len, slots, request.block_table))
            token_ids += request.tokens_between(computed, context_len)
            positions += range(computed, context_len)
            if gets_token:
                rows.append(len(token_ids) - 1)
        # One buffer and one copy to the device; a list of Python integers is read faster by array than by torch.
        numbers = torch.frombuffer(array("q", token_ids + positions + rows), dtype=torch.int64).to(self._model.device)
        num_tokens = len(token_ids)
        batch = Batch(numbers[:num_tokens], numbers[num_tokens : 2 * num_tokens], tuple(spans))
        return batch, numbers[2 * num_tokens :]

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
