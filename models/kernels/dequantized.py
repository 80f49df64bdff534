"""The dequantized backend: the weight with its correction as one dense matrix, for measuring and not for serving.

Takes the memory of the dense network, and in return the time of one dense product per layer: on a CPU that scores whole
windows two to three times as fast as kernels that unpack codes on every call. It is never chosen unless asked for.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.grid import dense_factors, dequantize
from ..types import LinearWeights
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms


@dataclass(frozen=True, slots=True)
class _DequantizedLinear:
    """weight: (out_features, in_features) in the activation dtype, of prepared inputs, correction included."""

    weight: Tensor
    terms: DenseTerms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.terms.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = self.terms.prepare_input(x)
        return self.terms.add_to(F.linear(x, self.weight), x)


class DequantizedBackend:
    """Runs every layer, as a dense one."""

    name = "dequantized"

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Always None."""
        return None

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Add codes and correction up in float32, then round to ``dtype`` once."""
        weight = dequantize(weights.quantized)
        if weights.correction is not None:
            lora_up, lora_down = (None if it is None else it.float() for it in dense_factors(weights.correction))
            assert lora_up is not None  # noqa: S101 - only the second factor can be missing
            if lora_down is None:
                weight[:, : lora_up.shape[1]] += lora_up
            else:
                weight += lora_up @ lora_down
        terms = DenseTerms.of(replace(weights, correction=None), device, dtype)
        return _DequantizedLinear(weight.to(device, dtype), terms)
