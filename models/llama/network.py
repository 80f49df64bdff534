"""What evaluation and serving need of a network, whichever way it runs."""

from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch, TokenBatch
from .config import LlamaConfig


class KVCache(Protocol):
    """Keys and values of past tokens, in blocks that the caller hands out."""

    @property
    def num_blocks(self) -> int:
        """Blocks that it has."""
        ...

    @property
    def num_slots(self) -> int:
        """Tokens that fit."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...

    @property
    def tensors(self) -> list[Tensor]:
        """All that it takes its bytes with."""
        ...

    @property
    def has_block_tables(self) -> bool:
        """Spans name their blocks (``SequenceSpan.block_table``), not their slots."""
        ...


class Network(Protocol):
    """A causal language model over ragged batches."""

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        ...

    # Any: each network takes the caches that it makes itself.
    def __call__(self, batch: Batch, kv_cache: Any = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) that ``logits`` takes; ``kv_cache`` is one of ``new_cache``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        ...

    def step(self, tokens: TokenBatch, kv_cache: Any) -> Tensor | None:
        """One step of generation over ``kv_cache``, one of ``new_cache``.

        Returns:
            Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``, which the next step may write over; None
            where n is 0.
        """
        ...

    def new_cache(self, num_blocks: int) -> KVCache:
        """A key-value cache of ``num_blocks`` blocks of 16 tokens."""
        ...

    @property
    def cache_block_bytes(self) -> int:
        """Bytes that one of its blocks takes."""
        ...


def run_step(network: Network, tokens: TokenBatch, kv_cache: Any) -> Tensor | None:
    """``Network.step`` by the network's own hidden states and logits."""
    batch, rows = tokens.tensors(network.device)
    hidden = network(batch, kv_cache)
    if not len(rows):
        return None
    return network.logits(hidden if len(rows) == batch.num_tokens else hidden.index_select(0, rows))
