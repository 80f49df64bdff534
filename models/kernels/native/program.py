"""Lists of fused operators over fixed buffers, made once, and the calls that take a batch through them."""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...scheme import ActivationScheme
from ...types import RowRanks
from .embedding import EmbeddingTable
from .inputs import LinearInput, activation_struct
from .pack import PackedMatrix
from .runtime import Runtime
from .structs import Activation, AttentionOp, CacheType, EmbeddingType, EmbedOp, LinearOp, Op, OpKind, OutputMode, Step

_TABLE_TYPES = {
    torch.float32: EmbeddingType.F32,
    torch.bfloat16: EmbeddingType.BF16,
    torch.float16: EmbeddingType.F16,
    torch.int8: EmbeddingType.I8,
}
_CACHE_TYPES = {torch.float16: CacheType.F16, torch.int8: CacheType.I8}


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm in front of a product: gains (in_features,) float32."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayer:
    """One layer's share of a key-value cache.

    keys:   (num_blocks, num_kv_heads, head_dim, 16) float16 or int8
    values: (num_blocks, num_kv_heads, 16, head_dim), the same type
    key_scale, value_scale: (num_blocks, num_kv_heads, 16) float32, of int8
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTables:
    """cosines, sines: (num_positions, head_dim / 2) float32, of every position that a step may have."""

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """window: tokens that a query sees, itself included; None: all. qkv: how queries, keys and values are rounded."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    qkv: ActivationScheme | None = None


class StepInputs(NamedTuple):
    """One batch as the kernels take it, 32-bit integers throughout: one run of consecutive rows per sequence.

    Arrays, not tensors: a step makes five, and making and addressing a tensor takes many times as long.

    token_ids, positions: (num_tokens,)
    starts:       (num_sequences + 1,), first row of each sequence, then num_tokens
    context_lens: (num_sequences,), tokens in the cache when this step is done
    block_tables: (num_sequences, table_stride), row by row
    ranks:        (num_tokens,), leading components of every low-rank term that count in a row; None: all, in all rows
    """

    token_ids: "array[int]"
    positions: "array[int]"
    starts: "array[int]"
    context_lens: "array[int]"
    block_tables: "array[int]"
    table_stride: int
    ranks: "array[int] | None" = None

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.token_ids)

    def struct(self) -> Step:
        """``qerve_step``; points into the arrays here."""
        addresses = [numbers.buffer_info()[0] for numbers in self[:5]]
        ranks = None if self.ranks is None else self.ranks.buffer_info()[0]
        return Step(*addresses, ranks, self.num_tokens, len(self.context_lens), self.table_stride)


class LinearCall:
    """One linear operator on its own; may be called from several threads.

    norm: goes before the product
    """

    def __init__(self, runtime: Runtime, matrix: PackedMatrix, inputs: LinearInput, norm: Norm | None = None) -> None:
        self._runtime = runtime
        self._matrix = matrix
        self._keep = (inputs, norm)
        self._input = _input(inputs, matrix.block, norm)
        self._parts = (ctypes.c_void_p * 1)(matrix.address)
        self._columns = (ctypes.c_int32 * 1)(0)

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """``x`` (num_rows, in_features) float32 -> (num_rows, out_features) float32; see ``PreparedLinear``."""
        x = x.contiguous()
        ranks = None if row_ranks is None else row_ranks.per_row.to(torch.int32).contiguous()
        y = x.new_empty(x.shape[0], self._matrix.out_features)
        if not len(x):
            return y
        op = LinearOp(
            input=self._input,
            x=x.data_ptr(),
            y=y.data_ptr(),
            parts=ctypes.addressof(self._parts),
            columns=ctypes.addressof(self._columns),
            ldx=x.shape[1],
            ldy=y.shape[1],
            num_parts=1,
            mode=OutputMode.STORE,
        )
        step = Step(ranks=None if ranks is None else ranks.data_ptr(), num_tokens=len(x))
        self._runtime.run((Op * 1)(Op(OpKind.LINEAR, ctypes.addressof(op))), step)
        return y


class Program:
    """Operators in order, over buffers that are fixed when they are added. Not for several threads at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._kinds: list[OpKind] = []
        self._structs: list[ctypes.Structure] = []
        self._keep: list[object] = []
        self._ops: ctypes.Array[Op] | None = None

    def embed(self, table: EmbeddingTable, hidden: Tensor) -> None:
        """Rows of ``table`` for the step's token ids into ``hidden`` (num_tokens or more, hidden_size) float32."""
        rows, scale = table.rows, table.scale
        op = EmbedOp(
            table=rows.data_ptr(),
            scales=None if scale is None else scale.data_ptr(),
            hidden=hidden.data_ptr(),
            hidden_size=rows.shape[1],
            vocab_size=rows.shape[0],
            type=_TABLE_TYPES[rows.dtype],
            group_size=0 if scale is None else rows.shape[1] // scale.shape[1],
        )
        self._add(OpKind.EMBED, op, table, hidden)

    def linear(
        self,
        parts: Sequence[PackedMatrix],
        inputs: LinearInput,
        x: Tensor,
        y: Tensor,
        *,
        columns: Sequence[int] = (0,),
        norm: Norm | None = None,
        mode: OutputMode = OutputMode.STORE,
    ) -> None:
        """Products of the rows of ``x`` with ``parts``, which share their input.

        Args:
            parts: weights, one behind the other.
            inputs: how rows become integers.
            x: (num_tokens or more, in_features) float32.
            y: (num_tokens or more, width) float32.
            columns: first column in ``y`` of each part.
            norm: goes before everything else.
            mode: store, add to ``y``, or store ``silu(gate) * up`` of two parts.
        """
        addresses = (ctypes.c_void_p * len(parts))(*(part.address for part in parts))
        first_columns = (ctypes.c_int32 * len(parts))(*columns, *(0,) * (len(parts) - len(columns)))
        op = LinearOp(
            input=_input(inputs, parts[0].block, norm),
            x=x.data_ptr(),
            y=y.data_ptr(),
            parts=ctypes.addressof(addresses),
            columns=ctypes.addressof(first_columns),
            ldx=x.shape[1],
            ldy=y.shape[1],
            num_parts=len(parts),
            mode=mode,
        )
        self._add(OpKind.LINEAR, op, addresses, first_columns, tuple(parts), inputs, norm, x, y)

    def attention(
        self, shape: AttentionShape, rotary: RotaryTables, cache: CacheLayer, *, qkv: Tensor, out: Tensor
    ) -> None:
        """Rotate, append to ``cache``, attend.

        Args:
            shape: heads and what each query sees.
            rotary: turns queries and keys.
            cache: this layer's keys and values.
            qkv: (num_tokens or more, (num_heads + 2 num_kv_heads) * head_dim) float32, rotated in place.
            out: (num_tokens or more, num_heads * head_dim) float32.
        """
        scales = (cache.key_scale, cache.value_scale)
        op = AttentionOp(
            qkv=qkv.data_ptr(),
            out=out.data_ptr(),
            cosines=rotary.cosines.data_ptr(),
            sines=rotary.sines.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            key_scales=None if scales[0] is None else scales[0].data_ptr(),
            value_scales=None if scales[1] is None else scales[1].data_ptr(),
            ld=qkv.shape[1],
            ldo=out.shape[1],
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            window=shape.window or 0,
            cache_type=_CACHE_TYPES[cache.keys.dtype],
            softmax_scale=shape.head_dim**-0.5,
            has_quantized_qkv=int(shape.qkv is not None),
            activation=Activation() if shape.qkv is None else activation_struct(shape.qkv),
        )
        self._add(OpKind.ATTENTION, op, rotary, cache, qkv, out)

    def run(self, step: StepInputs) -> None:
        """Take a batch through all operators.

        Raises:
            KernelError: a token id that is not in the table; nothing was written.
        """
        if self._ops is None:
            items = [Op(kind, ctypes.addressof(op)) for kind, op in zip(self._kinds, self._structs, strict=True)]
            self._ops = (Op * len(items))(*items)
        self._runtime.run(self._ops, step.struct())

    def _add(self, kind: OpKind, op: ctypes.Structure, *keep: object) -> None:
        self._kinds.append(kind)
        self._structs.append(op)
        self._keep.append(keep)
        self._ops = None


def _input(inputs: LinearInput, block: int, norm: Norm | None) -> ctypes.Structure:
    if norm is None:
        return inputs.struct(block)
    return inputs.struct(block, norm.weight, norm.eps)
