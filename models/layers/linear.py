"""The two linear layers of the network: a dense one, and one that a kernel backend runs from its quantized form."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import KernelError
from ..kernels.base import KernelBackend, LinearSpec, PreparedLinear, RowReader, Selection, select_backend
from ..types import LinearWeights, RowRanks


class DenseLinear(nn.Module):
    """``x @ weight.T + bias`` with parameters taken as they are: no copy, no gradient.

    weight: (out_features, in_features), floating point
    bias:   (out_features,) or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps resident."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in_features) -> (..., out_features), same dtype."""
        return F.linear(x, self.weight, self.bias)


class LowRankLinear(nn.Module):
    """A quantized linear layer with its low-rank correction, run by the backend that was selected for it.

    prepared:  the layer repacked by the backend; holds all of its tensors, so ``Module.to`` does not move them
    selection: the backend, and why each preferred one was passed over
    """

    def __init__(self, prepared: PreparedLinear, selection: Selection) -> None:
        super().__init__()
        self.prepared = prepared
        self.selection = selection

    @classmethod
    def of(
        cls,
        weights: LinearWeights,
        backends: Sequence[KernelBackend],
        *,
        device: torch.device,
        dtype: torch.dtype,
        where: str,
    ) -> Self:
        """``weights`` repacked by the first of ``backends`` that can run them on ``device`` with ``dtype`` activations.

        Raises:
            KernelError: none can; ``where`` names the layer.
        """
        selection = select_backend(LinearSpec.of(weights, device, dtype), backends, where)
        return cls(selection.backend.prepare(weights, device, dtype), selection)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps resident."""
        return self.prepared.nbytes

    def forward(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """``x`` (num_tokens, in_features) -> (num_tokens, out_features), same dtype; see ``PreparedLinear``."""
        return self.prepared(x, row_ranks)

    @property
    def has_rows(self) -> bool:
        """The backend gives single rows of the weight too: ``rows`` works."""
        return isinstance(self.prepared, RowReader)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows ``indices`` (n,) int64 of the weight: (n, in_features) float32. What a quantized embedding does.

        Raises:
            KernelError: the backend does not give single rows.
        """
        if not isinstance(self.prepared, RowReader):
            raise KernelError(f"kernel backend {self.selection.backend.name} does not give single rows of a weight")
        return self.prepared.rows(indices)

    def extra_repr(self) -> str:
        """Name the backend when the module is printed."""
        return f"backend={self.selection.backend.name}"


def apply_linear(linear: nn.Module, x: Tensor, row_ranks: RowRanks | None) -> Tensor:
    """``linear(x)`` with as much of its correction as ``row_ranks`` says; only quantized layers have one."""
    has_ranks = row_ranks is not None and isinstance(linear, LowRankLinear)
    output: Tensor = linear(x, row_ranks) if has_ranks else linear(x)
    return output
