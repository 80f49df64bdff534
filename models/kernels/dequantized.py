"""The dequantized backend: the weight with its correction as one dense matrix, for measuring and not for serving.

Takes the memory of the dense network, and in return the time of one dense product per layer: on a CPU that scores whole
windows two to three times as fast as kernels that unpack codes on every call. It is never chosen unless asked for.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reconstruct.loss import stored_weight
from ..types import LinearWeights, RowRanks
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms


@dataclass(frozen=True, slots=True)
class _DequantizedLinear:
    """weight: (out_features, in_features) in the activation dtype, of prepared inputs, correction included.

    correction: the low-rank term on its own, to take out what a row does not get of it
    """

    weight: Tensor
    terms: DenseTerms
    correction: DenseTerms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.terms.nbytes + self.correction.nbytes

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        x = self.terms.prepare_input(x)
        product = self.terms.add_to(F.linear(x, self.weight), x)
        if row_ranks is None:
            return product
        nothing = torch.zeros_like(product)
        missing = self.correction.add_to(nothing.clone(), x) - self.correction.add_to(nothing, x, row_ranks)
        return product.sub_(missing)


class DequantizedBackend:
    """Runs every layer, as a dense one."""

    name = "dequantized"

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Always None."""
        return None

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Add codes and correction up in float64, then round to ``dtype`` once."""
        weight = stored_weight(weights)
        terms = DenseTerms.of(replace(weights, correction=None), device, dtype)
        correction = DenseTerms.of(LinearWeights(weights.quantized, weights.correction), device, dtype)
        return _DequantizedLinear(weight.to(device, dtype), terms, correction)
