"""The network on a GPU: the same layers over a paged cache, with decode steps that are recorded once and replayed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .attention_choice import AttentionChoice
from .batch import Batch, TokenBatch
from .config import LlamaConfig
from .decode_graphs import DecodeGraphs, GraphDevice
from .kv_cache import PagedKVCache
from .model import LlamaForCausalLM
from .network import run_step
from .paged_plan import PagedLayout, PagedPlan


class PagedLlama:
    """``layers`` over caches whose spans name blocks; a ``Network``.

    Without a cache it is ``layers`` themselves. It stays correct on every device; made for CUDA.

    attention: the kernels that attend over a cache
    """

    def __init__(self, layers: LlamaForCausalLM, attention: AttentionChoice) -> None:
        self.layers = layers
        self.attention = attention
        self._graphs: DecodeGraphs | None = None

    @property
    def config(self) -> LlamaConfig:
        """Its shape."""
        return self.layers.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches must be."""
        return self.layers.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.layers.dtype

    def __call__(self, batch: Batch, kv_cache: PagedKVCache | None = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) after the final norm.

        Raises:
            ValueError: the spans' block tables do not fit the cache.
        """
        with self._current_device():
            if kv_cache is None:
                hidden: Tensor = self.layers(batch)
                return hidden
            layout = PagedLayout.of(batch.spans, kv_cache, self.device)
            plans = {window: PagedPlan(layout, self.attention, window) for window in self.config.windows}
            return self.layers.attend_by(plans, batch, kv_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        with self._current_device():
            return self.layers.logits(hidden)

    @torch.inference_mode()
    def step(self, tokens: TokenBatch, kv_cache: PagedKVCache) -> Tensor | None:
        """Logits (n, vocab_size) float32 of the n ``tokens.logit_rows``; None where n is 0.

        A decode of every sequence replays a recorded step where there is one; the next such step writes over its
        logits. Everything else runs kernel by kernel: prompts, drafts, steps that give no logits of some row.
        """
        graphs = self._graphs
        if graphs is not None and (size := graphs.size_for(tokens, kv_cache)) is not None:
            with self._current_device():
                return graphs.run(tokens, size)
        return run_step(self, tokens, kv_cache)

    def new_cache(self, num_blocks: int) -> PagedKVCache:
        """A key-value cache of ``num_blocks`` blocks of 16 tokens, and one for rows that fill up recorded steps."""
        return PagedKVCache(
            self.config,
            num_blocks,
            dtype=self.layers.cache_dtype,
            device=self.device,
            has_block_tables=True,
            has_scratch=True,
        )

    @property
    def cache_block_bytes(self) -> int:
        """Bytes that one of its blocks takes."""
        return self.layers.cache_block_bytes

    @property
    def graphs_obstacle(self) -> str | None:
        """Why decode steps of this network cannot be recorded; None: they can."""
        if self.config.rope.rope_type == "dynamic":
            return "dynamic rotary embeddings turn with the length of the sequence, which a recorded step does not see"
        if self.device.type == "cuda" and self.attention.decode.name == "torch":
            return "PyTorch's attention reads whole block tables, however short a sequence is"
        return None

    def record_decodes(
        self,
        kv_cache: PagedKVCache,
        sizes: Sequence[int],
        max_context: int,
        device: GraphDevice,
        *,
        has_ranks: bool,
    ) -> None:
        """Record decode steps over ``kv_cache``, which ``step`` replays from now on.

        Args:
            kv_cache: one of ``new_cache``.
            sizes: batch sizes, see ``graph_sizes``.
            max_context: tokens of the longest sequence.
            device: records.
            has_ranks: also for rows that get less of the corrections.
        """
        graphs = DecodeGraphs(self.layers, self.attention, kv_cache, sizes, max_context, has_ranks=has_ranks)
        with self._current_device():
            graphs.record(device)
        self._graphs = graphs

    def _current_device(self) -> AbstractContextManager[object]:
        """Triton launches on the calling thread's current device, which is the first one unless it is told."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
