"""A network as one list of fused operators, made once per key-value cache: it holds the addresses of all it works on.

embed
per layer:  norm, quantize, q k v  ->  rotate, append to the cache, attend  ->  quantize, o, onto the residual
            norm, quantize, silu(gate) * up  ->  quantize, down, onto the residual
head:       norm, quantize, logits
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.native.embedding import EmbeddingTable
from ..kernels.native.program import AttentionShape, Program, RotaryTables
from ..kernels.native.runtime import Runtime
from ..kernels.native.structs import OutputMode
from .batch import Batch
from .config import LlamaConfig
from .native_cache import NativeKVCache
from .native_layers import LinearGroup, NativeHead, NativeLayer
from .rope import RotaryEmbedding

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


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """What operators hand to each other, float32.

    hidden:   (num_rows, hidden_size), the residual
    qkv:      (num_rows, (num_heads + 2 num_kv_heads) * head_dim)
    attended: (num_rows, num_heads * head_dim)
    inner:    (num_rows, intermediate_size)
    logits:   (num_logits, vocab_size)
    """

    hidden: Tensor
    qkv: Tensor
    attended: Tensor
    inner: Tensor
    logits: Tensor

    @classmethod
    def of(cls, config: LlamaConfig, num_rows: int, num_logits: int = 0) -> "Buffers":
        """Of these sizes, not initialized."""
        hidden, qkv, attended, inner = (torch.empty(num_rows, width) for width in buffer_widths(config))
        return cls(hidden, qkv, attended, inner, torch.empty(num_logits, config.vocab_size))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.nbytes for part in (self.hidden, self.qkv, self.attended, self.inner, self.logits))


class NativePrograms:
    """The operators of one network over each of its caches, kept as long as that lives. For one thread at a time."""

    def __init__(self, weights: NativeWeights, runtime: Runtime) -> None:
        self._weights = weights
        self._runtime = runtime
        self._made: weakref.WeakKeyDictionary[NativeKVCache, dict[bool, Program]] = weakref.WeakKeyDictionary()
        # Beside the tensors, which are slow to ask: between two steps, everything of torch has left the caches.
        self._num_rows = self._num_logits = self._num_positions = 0
        self._reserve_rows(1, 0)
        self._reserve_positions(min(_FIRST_POSITIONS, weights.config.max_position_embeddings))

    def over(
        self, cache: NativeKVCache, num_rows: int, num_positions: int, *, has_head: bool = False
    ) -> tuple[Program, Buffers]:
        """Operators over ``cache`` and buffers for ``num_rows``; those for very many rows are not kept.

        Args:
            cache: keys and values.
            num_rows: rows of a step.
            num_positions: tokens of the longest sequence.
            has_head: the operators include the head, for every row.
        """
        num_logits = num_rows if has_head else 0
        if num_positions > self._num_positions:
            self._reserve_positions(max(num_positions, 2 * self._num_positions))
        if num_rows > max(_KEPT_ROWS, self._num_rows):
            buffers = Buffers.of(self._weights.config, num_rows, num_logits)
            return self._program(cache, buffers, has_head), buffers
        if num_rows > self._num_rows or num_logits > self._num_logits:
            self._reserve_rows(_grown(self._num_rows, num_rows), _grown(self._num_logits, num_logits))
        made = self._made.setdefault(cache, {})
        if has_head not in made:
            made[has_head] = self._program(cache, self._buffers, has_head)
        return made[has_head], self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and of the tables of positions."""
        return self._buffers.nbytes + self._rotary.cosines.nbytes + self._rotary.sines.nbytes

    def _reserve_positions(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._rotary = rotary_tables(self._weights.config, num_positions)
        self._made.clear()

    def _reserve_rows(self, num_rows: int, num_logits: int) -> None:
        self._num_rows, self._num_logits = num_rows, num_logits
        self._buffers = Buffers.of(self._weights.config, num_rows, num_logits)
        self._made.clear()

    def _program(self, cache: NativeKVCache, buffers: Buffers, has_head: bool) -> Program:
        config, program = self._weights.config, Program(self._runtime)
        program.embed(self._weights.table, buffers.hidden)
        for index, layer in enumerate(self._weights.layers):
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
        if has_head:
            head = self._weights.head
            program.linear([head.weight], head.inputs, buffers.hidden, buffers.logits, norm=head.norm)
        return program


def _grown(have: int, wanted: int) -> int:
    """``have`` if that is enough, else ``wanted`` or more, so that a few growths are all."""
    return have if wanted <= have else max(wanted, min(2 * have, _KEPT_ROWS))


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
