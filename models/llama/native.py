"""The network over the native kernels: the same function as ``LlamaForCausalLM``, as one list of fused operators.

    embed
    per layer:  norm, quantize, q k v  ->  rotate, append to the cache, attend  ->  quantize, o, onto the residual
                norm, quantize, silu(gate) * up  ->  quantize, down, onto the residual
    head:       norm, quantize, logits

A batch goes through all of it in one call, with every worker thread inside from the first operator to the last. Hidden
states are float32. The list is made once per key-value cache: it holds the addresses of buffers, weights and cache.
"""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.native.embedding import EmbeddingTable
from ..kernels.native.program import AttentionShape, LinearCall, Program, RotaryTables
from ..kernels.native.runtime import Runtime
from ..kernels.native.structs import OutputMode
from .batch import Batch
from .config import LlamaConfig
from .native_cache import NativeKVCache
from .native_layers import LinearGroup, NativeHead, NativeLayer
from .native_steps import fresh_tables, given_tables, steps_of
from .rope import RotaryEmbedding

STEP_ROWS = 512
"""Rows that go through the network together when a cache holds what came before: more would only take memory."""
_KEPT_ROWS = 2048
_FIRST_POSITIONS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class NativeWeights:
    """All parameters, in the forms that the kernels read."""

    config: LlamaConfig
    table: EmbeddingTable
    layers: tuple[NativeLayer, ...]
    head: NativeHead

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes in memory, by component."""
        return {
            "linear layers": sum(layer.linear_bytes for layer in self.layers),
            "head": self.head.nbytes,
            "embedding": self.table.nbytes,
            "norms": sum(layer.norm_bytes for layer in self.layers) + self.head.norm.weight.nbytes,
        }


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
        self._buffers = _Buffers.of(weights.config, 1)
        self._rotary = rotary_tables(weights.config, min(_FIRST_POSITIONS, weights.config.max_position_embeddings))
        self._programs: weakref.WeakKeyDictionary[NativeKVCache, Program] = weakref.WeakKeyDictionary()
        self._own_cache = self._layer_cache(1)

    def __call__(self, batch: Batch, kv_cache: NativeKVCache | None = None) -> Tensor:
        """Hidden states (num_tokens, hidden_size) float32 before the final norm, which ``logits`` applies.

        Raises:
            ValueError: the spans' block tables do not fit the cache.
            KernelError: a token id that the vocabulary does not have.
        """
        tables = fresh_tables(batch) if kv_cache is None else given_tables(batch, kv_cache)
        hidden = torch.empty(batch.num_tokens, self.config.hidden_size)
        if not batch.num_tokens:
            return hidden
        max_rows = batch.num_tokens if kv_cache is None else STEP_ROWS
        longest = max(span.context_len for span in batch.spans)
        with self._lock:
            self._reserve_positions(longest)
            cache = kv_cache or self._scratch_cache(sum(map(len, tables)))
            program, buffers = self._bound(cache, min(max_rows, batch.num_tokens))
            start = 0
            for step in steps_of(batch, tables, max_rows):
                program.run(step)
                end = start + len(step.token_ids)
                hidden[start:end] = buffers.hidden[: end - start]
                start = end
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, hidden_size) -> (n, vocab_size) float32."""
        return self._head(hidden)

    def new_cache(self, num_blocks: int) -> NativeKVCache:
        """A key-value cache of ``num_blocks`` blocks for this network."""
        return NativeKVCache(self.config, num_blocks, self.cache_dtype)

    @property
    def cache_block_bytes(self) -> int:
        """Bytes of one of its blocks."""
        return NativeKVCache.bytes_per_block(self.config, self.cache_dtype)

    def _layer_cache(self, num_blocks: int) -> NativeKVCache:
        return NativeKVCache(self.config, num_blocks, self.cache_dtype, num_layers=1)

    def _scratch_cache(self, num_blocks: int) -> NativeKVCache:
        if self._own_cache.num_blocks < num_blocks:
            self._own_cache = self._layer_cache(num_blocks)
        return self._own_cache

    def _reserve_positions(self, num_positions: int) -> None:
        have = len(self._rotary.cosines)
        if have < num_positions:
            self._rotary = rotary_tables(self.config, max(num_positions, 2 * have))
            self._programs.clear()

    def _bound(self, cache: NativeKVCache, num_rows: int) -> tuple[Program, "_Buffers"]:
        """Operators over ``cache`` and buffers for ``num_rows``; those for very many rows are not kept."""
        if num_rows > max(_KEPT_ROWS, self._buffers.num_rows):
            buffers = _Buffers.of(self.config, num_rows)
            return self._program(cache, buffers), buffers
        if num_rows > self._buffers.num_rows:
            self._buffers = _Buffers.of(self.config, max(num_rows, min(2 * self._buffers.num_rows, _KEPT_ROWS)))
            self._programs.clear()
        program = self._programs.get(cache)
        if program is None:
            program = self._programs[cache] = self._program(cache, self._buffers)
        return program, self._buffers

    def _program(self, cache: NativeKVCache, buffers: "_Buffers") -> Program:
        config, program = self.config, Program(self.runtime)
        program.embed(self.weights.table, buffers.hidden)
        for index, layer in enumerate(self.weights.layers):
            for group in layer.qkv:
                program.linear(
                    group.matrices,
                    group.inputs,
                    buffers.hidden,
                    buffers.qkv,
                    columns=group.columns,
                    norm=layer.input_norm,
                )
            shape = attention_shape(config, index)
            program.attention(shape, self._rotary, cache.layer(index), qkv=buffers.qkv, out=buffers.attended)
            _add_onto(program, layer.o_proj, buffers.attended, buffers.hidden)
            program.linear(
                layer.gate_up.matrices,
                layer.gate_up.inputs,
                buffers.hidden,
                buffers.inner,
                norm=layer.mlp_norm,
                mode=OutputMode.SWIGLU,
            )
            _add_onto(program, layer.down_proj, buffers.inner, buffers.hidden)
        return program


@dataclass(frozen=True, slots=True, eq=False)
class _Buffers:
    """What operators hand to each other, float32.

    hidden:   (num_rows, hidden_size), the residual
    qkv:      (num_rows, (num_heads + 2 num_kv_heads) * head_dim)
    attended: (num_rows, num_heads * head_dim)
    inner:    (num_rows, intermediate_size)
    """

    hidden: Tensor
    qkv: Tensor
    attended: Tensor
    inner: Tensor

    @classmethod
    def of(cls, config: LlamaConfig, num_rows: int) -> "_Buffers":
        return cls(*(torch.empty(num_rows, width) for width in buffer_widths(config)))

    @property
    def num_rows(self) -> int:
        return len(self.hidden)


def attention_shape(config: LlamaConfig, layer_index: int) -> AttentionShape:
    """Heads of decoder layer ``layer_index``, and what they see."""
    return AttentionShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.window(layer_index),
        config.attention,
    )


def buffer_widths(config: LlamaConfig) -> tuple[int, int, int, int]:
    """Columns of what operators hand to each other: the residual, q k v, what was attended, what goes into down."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return (
        config.hidden_size,
        (heads + 2 * kv_heads) * config.head_dim,
        heads * config.head_dim,
        config.intermediate_size,
    )


def _add_onto(program: Program, group: LinearGroup, x: Tensor, residual: Tensor) -> None:
    program.linear(group.matrices, group.inputs, x, residual, mode=OutputMode.ADD)


def rotary_tables(config: LlamaConfig, num_positions: int) -> RotaryTables:
    """Cosines and sines of positions 0 to ``num_positions`` for the network of ``config``."""
    positions = torch.arange(num_positions)
    rotary = RotaryEmbedding(config)(Batch(positions, positions, ()), torch.float32)
    return RotaryTables(rotary.cos[:, 0].contiguous(), rotary.sin[:, 0].contiguous())
