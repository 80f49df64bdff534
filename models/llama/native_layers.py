"""The parameters of a fused network: which products share an operator, and why some cannot."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.native.backend import NativeLinear
from ..kernels.native.inputs import LinearInput
from ..kernels.native.pack import PackedMatrix
from ..kernels.native.program import Norm


@dataclass(frozen=True, slots=True, eq=False)
class LinearGroup:
    """Weights that multiply the same integers, and the first column of each one's outputs."""

    matrices: tuple[PackedMatrix, ...]
    inputs: LinearInput
    columns: tuple[int, ...]

    @classmethod
    def of(cls, linears: Sequence[NativeLinear], columns: Sequence[int]) -> "LinearGroup":
        """``linears``, whose inputs are the same but for the width of the blocks, which is made the same."""
        block = min(linear.matrix.block for linear in linears)
        matrices = tuple(
            linear.matrix if linear.matrix.block == block else linear.matrix.narrowed(block) for linear in linears
        )
        return cls(matrices, linears[0].inputs, tuple(columns))

    @property
    def nbytes(self) -> int:
        """Bytes that its weights keep resident."""
        return sum(matrix.nbytes for matrix in self.matrices) + self.inputs.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class NativeLayer:
    """One decoder layer.

    qkv: one group, or several where queries, keys and values treat their common input differently
    """

    input_norm: Norm
    qkv: tuple[LinearGroup, ...]
    o_proj: LinearGroup
    mlp_norm: Norm
    gate_up: LinearGroup
    down_proj: LinearGroup

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """All of its linear layers, in the order in which they run."""
        return (*self.qkv, self.o_proj, self.gate_up, self.down_proj)

    @property
    def linear_bytes(self) -> int:
        """Bytes of its seven linear layers."""
        return sum(group.nbytes for group in self.groups)

    @property
    def norm_bytes(self) -> int:
        """Bytes of its norms."""
        return self.input_norm.weight.nbytes + self.mlp_norm.weight.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class NativeHead:
    """Final norm and head."""

    norm: Norm
    weight: PackedMatrix
    inputs: LinearInput

    @property
    def nbytes(self) -> int:
        """Bytes that the head keeps resident."""
        return self.weight.nbytes + self.inputs.nbytes


def group_by_input(linears: Sequence[NativeLinear], columns: Sequence[int]) -> tuple[LinearGroup, ...]:
    """As few groups as the inputs of ``linears`` allow, in order."""
    members: list[list[int]] = []
    for index, linear in enumerate(linears):
        same = next((group for group in members if linears[group[0]].inputs.is_same_as(linear.inputs)), None)
        if same is None:
            members.append([index])
        else:
            same.append(index)
    return tuple(
        LinearGroup.of([linears[index] for index in group], [columns[index] for index in group]) for group in members
    )


def norm_of(weight: Tensor, eps: float) -> Norm:
    """Gains (hidden_size,) as the kernels read them."""
    return Norm(weight.detach().to(torch.float32).contiguous(), eps)
