"""The network over the native kernels: the same function as ``LlamaForCausalLM``.

A batch goes through all of it in one call, with every worker thread inside from the first operator to the last. Hidden
states are float32.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.native.program import LinearCall
from ..kernels.native.runtime import Runtime
from .batch import Batch, SequenceSpan, TokenBatch
from .native_cache import NativeKVCache
from .native_programs import NativePrograms, NativeWeights
from .native_steps import fresh_tables, given_tables, steps_of

STEP_ROWS = 512
"""Rows that go through the network together when a cache holds what came before: more would only take memory."""


class NativeLlama:
    """A LLaMA whose every layer the native kernels run.

    cache_dtype: of keys and values, float16 or int8; evaluation without a cache uses it as well
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, weights: NativeWeights, runtime: Runtime, cache_dtype: torch.dtype = torch.float16) -> None:
        self.config = weights.config
        self.weights = weights
        self.runtime = runtime
        self.cache_dtype = cache_dtype
        self._lock = threading.Lock()
        self._head = LinearCall(runtime, weights.head.weight, weights.head.inputs, weights.head.norm)
        self._programs = NativePrograms(weights, runtime)
        self._own_cache = self._layer_cache(1)

    def __call__(self, batch: Batch, kv_cache: NativeKVCache | None = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) float32 before the final norm, which ``logits`` applies.

        Raises:
            ValueError: the spans' block tables do not fit the cache.
            KernelError: a token id that the vocabulary does not have.
        """
        return self._hidden(batch.token_ids.tolist(), batch.spans, kv_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        return self._head(hidden)

    def step(self, tokens: TokenBatch, kv_cache: NativeKVCache) -> Tensor | None:
        """Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``; None where n is 0. Errors as in a call.

        Where that is every row, as when all sequences decode, the head follows on the last layer in the same call of
        the kernels, and the next step writes over the logits.
        """
        token_ids, spans, rows = tokens
        if 0 < len(rows) == len(token_ids) <= STEP_ROWS:
            return self._step(token_ids, spans, kv_cache)
        hidden = self._hidden(token_ids, spans, kv_cache)
        return self.logits(hidden[rows]) if rows else None

    def _step(self, token_ids: Sequence[int], spans: Sequence[SequenceSpan], cache: NativeKVCache) -> Tensor:
        """Logits of all rows, at least one and at most ``STEP_ROWS``."""
        num_rows = len(token_ids)
        (step,) = steps_of(token_ids, spans, given_tables(spans, cache), num_rows)
        with self._lock:
            program, buffers = self._programs.over(cache, num_rows, max(step.context_lens), has_head=True)
            program.run(step)
            return buffers.logits[:num_rows]

    def _hidden(
        self, token_ids: Sequence[int], spans: Sequence[SequenceSpan], kv_cache: NativeKVCache | None
    ) -> Tensor:
        tables = fresh_tables(spans) if kv_cache is None else given_tables(spans, kv_cache)
        num_rows = len(token_ids)
        hidden = torch.empty(num_rows, self.config.hidden_size)
        if not num_rows:
            return hidden
        max_rows = num_rows if kv_cache is None else min(STEP_ROWS, num_rows)
        longest = max(span.context_len for span in spans)
        with self._lock:
            cache = kv_cache or self._scratch_cache(sum(map(len, tables)))
            program, buffers = self._programs.over(cache, max_rows, longest)
            start = 0
            for step in steps_of(token_ids, spans, tables, max_rows):
                program.run(step)
                end = start + step.num_tokens
                hidden[start:end] = buffers.hidden[: end - start]
                start = end
        return hidden

    def new_cache(self, num_blocks: int) -> NativeKVCache:
        """A key-value cache of ``num_blocks`` blocks for this network."""
        return NativeKVCache(self.config, num_blocks, self.cache_dtype)

    @property
    def cache_block_bytes(self) -> int:
        """Bytes of one of its blocks."""
        return NativeKVCache.bytes_per_block(self.config, self.cache_dtype)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of what operators hand to each other, and of the positions' tables."""
        return self._programs.nbytes

    def _layer_cache(self, num_blocks: int) -> NativeKVCache:
        return NativeKVCache(self.config, num_blocks, self.cache_dtype, num_layers=1)

    def _scratch_cache(self, num_blocks: int) -> NativeKVCache:
        if self._own_cache.num_blocks < num_blocks:
            self._own_cache = self._layer_cache(num_blocks)
        return self._own_cache
