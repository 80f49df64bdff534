"""The reference backend: the specification of what a quantized layer computes, on every device and dtype.

    x_c = quantize((x / input_scale)[:, channel_order] @ H)        H: Hadamard blocks
    y   = x_c @ dequantize(codes)^T + bias + (x_c @ lora_down^T) @ lora_up^T

as far as a layer has these parts. Each call unpacks the codes, dequantizes to float32, casts to the activation dtype
and multiplies: nothing unpacked stays resident, and nothing is fused.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.grid import dequantize
from ..quant.packing import pack, unpack
from ..scheme import QuantScheme
from ..types import LinearWeights, QuantizedWeight
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms


@dataclass(frozen=True, slots=True)
class _ReferenceLinear:
    """weight_packed: (out_features, packed bytes) uint8, as in the artifact; scale and zero_point as quantized."""

    weight_packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    in_features: int
    terms: DenseTerms

    @property
    def nbytes(self) -> int:
        zero_point_bytes = 0 if self.zero_point is None else self.zero_point.nbytes
        return self.weight_packed.nbytes + self.scale.nbytes + zero_point_bytes + self.terms.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes = unpack(self.weight_packed, self.scheme.num_bits, self.in_features)
        weight = dequantize(QuantizedWeight(codes, self.scale, self.zero_point, self.scheme))
        x = self.terms.prepare_input(x)
        return self.terms.add_to(F.linear(x, weight.to(x.dtype)), x)


class ReferenceBackend:
    """Runs every layer, slowly."""

    name = "reference"

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Always None."""
        return None

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Pack the codes as the artifact stores them."""
        quantized = weights.quantized
        return _ReferenceLinear(
            weight_packed=pack(quantized.codes, quantized.scheme.num_bits).to(device),
            scale=quantized.scale.to(device),
            zero_point=None if quantized.zero_point is None else quantized.zero_point.to(device),
            scheme=quantized.scheme,
            in_features=quantized.in_features,
            terms=DenseTerms.of(weights, device, dtype),
        )
