"""How the rows in front of a weight become the integers that it is multiplied with."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...scheme import PER_TOKEN, ActivationScheme
from ...types import LinearWeights
from .structs import Activation, ActivationKind, Input

ActivationBits: TypeAlias = Literal[8, 16]
"""For layers whose artifact leaves their inputs unquantized: one scale per block and row, symmetric."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearInput:
    """Divide, gather, rotate, quantize, as ``LinearWeights`` defines it.

    divisor:        (in_features,) float32, or None
    channel_order:  (in_features,) int32, or None
    rotation_block: width of the Hadamard blocks, 0: not rotated
    activations:    the artifact's own scheme, or bits for inputs that it leaves alone
    """

    in_features: int
    divisor: Tensor | None
    channel_order: Tensor | None
    rotation_block: int
    activations: ActivationScheme | ActivationBits

    @classmethod
    def of(cls, weights: LinearWeights, bits: ActivationBits) -> "LinearInput":
        """The input of ``weights``, with ``bits`` where the artifact does not quantize it."""
        scale, order = weights.input_scale, weights.channel_order
        return cls(
            weights.quantized.in_features,
            None if scale is None else scale.float().contiguous(),
            None if order is None else order.int().contiguous(),
            weights.rotation_block,
            weights.activations or bits,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps resident."""
        return sum(tensor.nbytes for tensor in (self.divisor, self.channel_order) if tensor is not None)

    def is_same_as(self, other: "LinearInput") -> bool:
        """Both make the same integers of the same row."""
        return (
            (self.in_features, self.rotation_block, self.activations)
            == (other.in_features, other.rotation_block, other.activations)
            and _are_equal(self.divisor, other.divisor)
            and _are_equal(self.channel_order, other.channel_order)
        )

    def struct(self, block: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0) -> Input:
        """``qerve_input``, behind an RMSNorm with the gains ``norm_weight`` (in_features,) float32 if there are any.

        The tensors that it points to must outlive it.
        """
        return Input(
            norm_weight=None if norm_weight is None else norm_weight.data_ptr(),
            divisor=None if self.divisor is None else self.divisor.data_ptr(),
            channel_order=None if self.channel_order is None else self.channel_order.data_ptr(),
            in_features=self.in_features,
            rotation_block=self.rotation_block,
            block=block,
            norm_eps=norm_eps,
            activation=activation_struct(self.activations),
        )


def activation_struct(activations: ActivationScheme | ActivationBits) -> Activation:
    """``qerve_activation`` of a scheme that ``why_not`` has nothing against."""
    if not isinstance(activations, ActivationScheme):
        return Activation(kind=ActivationKind.BITS_8 if activations == 8 else ActivationKind.BITS_16, clip_ratio=1.0)
    return Activation(
        kind=ActivationKind.INT if activations.format == "int" else ActivationKind.MXINT,
        num_bits=activations.num_bits,
        group_size=0 if activations.group_size == PER_TOKEN else activations.group_size,
        is_symmetric=int(activations.is_symmetric),
        is_ceil=int(activations.exponent == "ceil"),
        clip_ratio=activations.clip_ratio,
    )


def why_not(activations: ActivationScheme) -> str | None:
    """Why the kernels cannot round inputs to this grid; None: they can."""
    if activations.format not in {"int", "mxint"}:
        return f"quantizes activations in uniform steps (int, mxint), not as {activations.format}"
    if activations.group_size != PER_TOKEN and activations.group_size % 32:
        return f"activations must share a scale in multiples of 32 channels, not {activations.group_size}"
    return None


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
