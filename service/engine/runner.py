"""One forward pass over the scheduled requests: from requests to tensors and back to logits."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.llama.batch import Batch, SequenceSpan
from models.llama.kv_cache import PagedKVCache

from .block_manager import BLOCK_SIZE
from .scheduler import ScheduledRequest


class ServedModel(Protocol):
    """What the engine needs of a network."""

    @property
    def device(self) -> torch.device:
        """Where the batch must be."""
        ...

    def __call__(self, batch: Batch, kv_cache: PagedKVCache | None = None) -> Tensor:
        """Final hidden states (num_tokens, hidden_size)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden_size) -> (n, vocab_size) float32."""
        ...


class Runner:
    """Runs the network against its key-value cache."""

    def __init__(self, model: ServedModel, kv_cache: PagedKVCache, block_size: int = BLOCK_SIZE) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = block_size

    @torch.inference_mode()
    def run(self, scheduled: Sequence[ScheduledRequest]) -> Tensor:
        """Logits (num_requests, vocab_size) float32 of the token after each request's last scheduled one."""
        batch = self._batch(scheduled)
        hidden = self._model(batch, self._kv_cache)
        last_rows = torch.tensor([span.start + span.num_tokens - 1 for span in batch.spans])
        return self._model.logits(hidden[last_rows.to(hidden.device)])

    def _batch(self, scheduled: Sequence[ScheduledRequest]) -> Batch:
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[SequenceSpan] = []
        for item, slots in zip(scheduled, self._slots(scheduled), strict=True):
            computed, context_len = item.request.num_computed_tokens, len(slots)
            spans.append(SequenceSpan(len(token_ids), item.num_tokens, context_len, slots))
            token_ids += item.request.uncomputed_token_ids[: item.num_tokens]
            positions += range(computed, context_len)
        device = self._model.device
        return Batch(
            torch.tensor(token_ids, dtype=torch.int64).to(device),
            torch.tensor(positions, dtype=torch.int64).to(device),
            tuple(spans),
        )

    def _slots(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, ...]:
        """Cache slots of every request's context, from one copy to the device."""
        offsets = torch.arange(self._block_size)
        rows, lengths = [], []
        for item in scheduled:
            length = item.request.num_computed_tokens + item.num_tokens
            blocks = torch.tensor(item.request.block_table[: -(-length // self._block_size)], dtype=torch.int64)
            rows.append((blocks[:, None] * self._block_size + offsets).flatten()[:length])
            lengths.append(length)
        return torch.split(torch.cat(rows).to(self._model.device), lengths)
