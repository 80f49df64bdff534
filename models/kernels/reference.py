"""The reference backend: the specification of what a quantized layer computes, on every device and dtype.

    x_c = quantize((x / input_scale)[:, channel_order] @ H)        H: Hadamard blocks
    y   = x_c @ dequantize(codes)^T + bias + (x_c @ lora_down^T) @ lora_up^T

as far as a layer has these parts. Each call unpacks the codes, dequantizes to float32, casts to the activation dtype
and multiplies, some rows of the weight at a time: nothing unpacked stays resident, and nothing is fused.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.grid import dequantize
from ..quant.packing import pack, unpack
from ..scheme import QuantScheme
from ..types import LinearWeights, QuantizedWeight, RowRanks
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms

_WEIGHTS_AT_ONCE = 1 << 20
"""Weights dequantized at a time: 4 MB of float32, small enough for the cache, however large the matrix is."""


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

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        x = self.terms.prepare_input(x)
        return self.terms.add_to(self._multiply(x), x, row_ranks)

    def rows(self, indices: Tensor) -> Tensor:
        return self._dequantize(indices)

    def _multiply(self, x: Tensor) -> Tensor:
        out_features = len(self.weight_packed)
        num_rows = max(1, _WEIGHTS_AT_ONCE // self.in_features)
        if out_features <= num_rows:
            return F.linear(x, self._dequantize(slice(None)).to(x.dtype))
        product = x.new_empty(len(x), out_features)
        for start in range(0, out_features, num_rows):
            rows = slice(start, start + num_rows)
            product[:, rows] = F.linear(x, self._dequantize(rows).to(x.dtype))
        return product

    def _dequantize(self, rows: slice | Tensor) -> Tensor:
        codes = unpack(self.weight_packed[rows], self.scheme.num_bits, self.in_features)
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return dequantize(QuantizedWeight(codes, self.scale[rows], zero_point, self.scheme))


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
