"""The embedding as the kernels look rows up in it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.affine import offset
from ...quant.grid import dequantize, grouped
from ...types import QuantizedWeight

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTable:
    """rows: (vocab_size, hidden_size) float32, bfloat16 or float16; or int8 with a scale per group of channels.

    scale: (vocab_size, num_groups) float32, or None
    """

    rows: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight) -> "EmbeddingTable":
        """Dense: as it is. Codes: as signed bytes, or in float16 where they are not uniform or do not fit."""
        if isinstance(weight, Tensor):
            return cls(weight.detach().contiguous())
        chunks = [
            weight.rows(slice(start, start + _ROWS_AT_ONCE)) for start in range(0, weight.out_features, _ROWS_AT_ONCE)
        ]
        if _fits_bytes(weight):
            return cls(torch.cat([_signed(chunk) for chunk in chunks]), weight.scale.float().contiguous())
        return cls(torch.cat([dequantize(chunk).half() for chunk in chunks]))

    @property
    def nbytes(self) -> int:
        """Bytes that the table keeps resident."""
        return self.rows.nbytes + (0 if self.scale is None else self.scale.nbytes)


def _fits_bytes(weight: QuantizedWeight) -> bool:
    """Codes minus their zero points lie in -128..127."""
    scheme = weight.scheme
    return scheme.format in {"int", "mxint"} and (scheme.is_symmetric or scheme.num_bits < 8)


def _signed(weight: QuantizedWeight) -> Tensor:
    """(rows, columns) int8."""
    zero = offset(weight.zero_point, weight.scheme)
    zero = zero[:, :, None] if isinstance(zero, Tensor) else zero
    return (grouped(weight.codes, weight.scheme).float() - zero).to(torch.int8).flatten(1)
