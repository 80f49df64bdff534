"""Parts of packed weights: the same weight without its low-rank term, and its first strip alone."""

from dataclasses import replace

from ..kernels.native.factors import RANK_BLOCK
from ..kernels.native.pack import PackedMatrix
from ..kernels.native.structs import STRIP_ROWS, Matrix
from ..llama.native_layers import LinearGroup
from ..llama.native_programs import NativeWeights

_SCALE_BYTES = 2
RANK_BLOCK_BYTES = STRIP_ROWS * (RANK_BLOCK + _SCALE_BYTES)
"""Low-rank codes and scales of 32 components at the end of a strip."""


def without_low_rank(matrix: PackedMatrix) -> PackedMatrix:
    """``matrix`` with rank 0, its strips moved together: the bytes that packing without the term gives."""
    if not matrix.num_rank_blocks:
        return matrix
    struct = Matrix.from_buffer_copy(matrix.struct)
    struct.strip_bytes -= matrix.num_rank_blocks * RANK_BLOCK_BYTES
    strips = matrix.strips.view(-1, matrix.struct.strip_bytes)[:, : struct.strip_bytes].contiguous().flatten()
    struct.strips, struct.down, struct.rank, struct.up_multiplier = strips.data_ptr(), None, 0, 1.0
    return PackedMatrix(struct, strips, matrix.bias, None)


def first_strip(matrix: PackedMatrix) -> PackedMatrix:
    """The first 32 output rows of ``matrix`` (fewer if it has fewer), without its low-rank term."""
    struct = Matrix.from_buffer_copy(matrix.struct)
    struct.out_features = min(STRIP_ROWS, matrix.out_features)
    struct.down, struct.rank = None, 0
    return PackedMatrix(struct, matrix.strips[: struct.strip_bytes], matrix.bias, None)


def has_low_rank(weights: NativeWeights) -> bool:
    """Some matrix of ``weights`` has a low-rank term."""
    return any(matrix.struct.rank for matrix in matrices_of(weights))


def matrices_of(weights: NativeWeights) -> list[PackedMatrix]:
    """Every matrix that a step multiplies with."""
    groups = (group for layer in weights.layers for group in layer.groups)
    return [matrix for group in groups for matrix in group.matrices] + [weights.head.weight]


def weights_without_low_rank(weights: NativeWeights) -> NativeWeights:
    """All of ``weights`` at rank 0; what has no low-rank term is shared."""
    layers = tuple(
        replace(
            layer,
            qkv=tuple(_bare(group) for group in layer.qkv),
            o_proj=_bare(layer.o_proj),
            gate_up=_bare(layer.gate_up),
            down_proj=_bare(layer.down_proj),
        )
        for layer in weights.layers
    )
    head = replace(weights.head, weight=without_low_rank(weights.head.weight))
    return replace(weights, layers=layers, head=head)


def _bare(group: LinearGroup) -> LinearGroup:
    return replace(group, matrices=tuple(without_low_rank(matrix) for matrix in group.matrices))
