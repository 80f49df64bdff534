"""Symmetric per-channel INT8 weights in bfloat16 on the CPU, through torch's weight-only int8 product.

One byte per weight, as in the artifact, and one scale per output row, which is applied after the sum in float32.
Few rows take torch's product; beyond about eight it is faster to convert the codes to bfloat16 (exact: they
have 8 bits) and multiply, some rows at a time so that the transient stays small.
Cost: scales in bfloat16. Each output is off by at most 2**-8 of itself, as much as rounding it to bfloat16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scheme import PER_CHANNEL
from ..types import LinearWeights, RowRanks
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms

_CHANNEL_MULTIPLE = 16
_ALIGNMENT = 32
_FEW_ROWS = 8
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class _Int8Linear:
    """weight: (out_features, in_features) int8; scale: (out_features,) bfloat16."""

    weight: Tensor
    scale: Tensor
    terms: DenseTerms

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes + self.terms.nbytes

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        x = self.terms.prepare_input(x)
        if x.shape[0] <= _FEW_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(_aligned(x), self.weight, self.scale)
        else:
            product = self._multiply_converted(x).mul_(self.scale)
        return self.terms.add_to(product, x, row_ranks)

    def _multiply_converted(self, x: Tensor) -> Tensor:
        out_features, in_features = self.weight.shape
        step = max(1, _WEIGHTS_AT_ONCE // in_features)
        blocks = torch.split(self.weight, step)
        if len(blocks) == 1:
            return F.linear(x, self.weight.to(x.dtype))
        product = x.new_empty(x.shape[0], out_features)
        for block, columns in zip(blocks, torch.split(product, step, dim=1), strict=True):
            torch.mm(x, block.to(x.dtype).T, out=columns)
        return product


class TorchInt8Backend:
    """torch's int8 product: CPU, bfloat16, symmetric INT8 with one scale per row."""

    name = "torch-int8"

    def unsupported(self, spec: LinearSpec) -> str | None:
        """The first condition that ``spec`` does not meet."""
        return next(_obstacles(spec), None)

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Shift the codes to signed bytes."""
        codes = weights.quantized.codes
        return _Int8Linear(
            weight=(codes ^ 128).view(torch.int8),
            scale=weights.quantized.scale[:, 0].to(dtype),
            terms=DenseTerms.of(weights, device, dtype),
        )


def _obstacles(spec: LinearSpec) -> Iterator[str]:
    scheme = spec.scheme
    if spec.device.type != "cpu":
        yield f"runs on the CPU only, not on {spec.device.type}"
    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        yield f"torch {torch.__version__} has no int8 product for the CPU"
    if spec.dtype != torch.bfloat16:
        yield f"runs in bfloat16 only, not in {str(spec.dtype).removeprefix('torch.')}"
    if scheme.num_bits != 8:
        yield f"takes 8-bit codes, not {scheme.num_bits}-bit ones"
    if scheme.format != "int" or scheme.group_size != PER_CHANNEL or not scheme.is_symmetric:
        yield "takes symmetric codes with one scale per row"
    if spec.in_features % _CHANNEL_MULTIPLE:
        yield f"in_features must be a multiple of {_CHANNEL_MULTIPLE}, not {spec.in_features}"


def _aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and starting on a vector boundary: torch loads it with instructions that fault otherwise."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
