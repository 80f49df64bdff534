"""The kernel contract, and the choice of a backend with the reasons kept.

A backend is chosen once, at load, per layer. Every backend is tested against the reference backend with an error
bound that follows from its accumulation type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import KernelError
from ..scheme import ActivationScheme, QuantScheme
from ..types import LinearWeights, RowRanks


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a backend must know about a layer to say whether it can run it.

    rotation_block: width of the Hadamard blocks of the input, 0: not rotated
    activations:    how the input is quantized, None: not at all
    """

    scheme: QuantScheme
    in_features: int
    out_features: int
    rank: int
    has_input_scale: bool
    has_channel_order: bool
    device: torch.device
    dtype: torch.dtype
    rotation_block: int = 0
    activations: ActivationScheme | None = None

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> "LinearSpec":
        """The specification of ``weights`` run on ``device`` with activations in ``dtype``."""
        quantized = weights.quantized
        return cls(
            scheme=quantized.scheme,
            in_features=quantized.in_features,
            out_features=quantized.out_features,
            rank=0 if weights.correction is None else weights.correction.rank,
            has_input_scale=weights.input_scale is not None,
            has_channel_order=weights.channel_order is not None,
            device=device,
            dtype=dtype,
            rotation_block=weights.rotation_block,
            activations=weights.activations,
        )


class PreparedLinear(Protocol):
    """One layer, repacked for a backend: the backend's own tensors behind one call."""

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps resident."""
        ...

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """``x`` (num_tokens, in_features) -> (num_tokens, out_features), same dtype.

        Args:
            x: the layer's input.
            row_ranks: how much of the correction each row gets; None: all of it.
        """
        ...


@runtime_checkable
class RowReader(Protocol):
    """A prepared layer that also gives single rows of its weight: one matrix is then output head and embedding."""

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps resident."""
        ...

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` (n,) of the dequantized weight, without its correction: (n, in_features) float32."""
        ...


class KernelBackend(Protocol):
    """One way to run a quantized linear layer."""

    @property
    def name(self) -> str:
        """Short name, as shown to the user and taken by ``--backend``."""
        ...

    def unsupported(self, spec: LinearSpec) -> str | None:
        """None when the backend can run the layer, else the reason, written for the user."""
        ...

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Repack ``weights`` once, at load."""
        ...


@dataclass(frozen=True, slots=True)
class Selection:
    """The backend that runs a layer, and why each backend before it does not: (backend name, reason)."""

    backend: KernelBackend
    passed_over: tuple[tuple[str, str], ...]


def select_backend(spec: LinearSpec, backends: Sequence[KernelBackend], where: str) -> Selection:
    """The first of ``backends`` (in order of preference) that can run the layer named ``where``.

    Raises:
        KernelError: none can, with every reason.
    """
    passed_over: list[tuple[str, str]] = []
    for backend in backends:
        reason = backend.unsupported(spec)
        if reason is None:
            return Selection(backend, tuple(passed_over))
        passed_over.append((backend.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over) or "no backend was offered"
    raise KernelError(f"{where}: no kernel backend can run this layer ({reasons})")
