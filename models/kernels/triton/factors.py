"""Low-rank factors as the kernels read them: 16-bit numbers, or the artifact's INT8 codes, which stay bytes in memory.

An INT8 factor beside another one has a scale per component (``quant.factors``). Both scales factor out of the products:

    x @ lora_down.T @ lora_up.T = sum over j of (x @ down_codes[j]) * (down_scale[j] * up_scale[j]) * up_codes[j]

So the kernels multiply with codes, which 16-bit floating point holds exactly, and one float32 scale meets each row and
component in between. ``lora_up`` counts as multiples of 2**-7 and the scale is 2**7 as large: what is rounded to 16
bits between the products is then about as large as what it adds to the output, and overflows float16 no sooner.

Every other form is widened when it is loaded: blocks of MXINT and INT4 have scales along the channels, and SERQ's
single factor, with a scale per output, is no larger in 16 bits than two factors in 8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.grid import dense_factors
from ...types import Correction, QuantizedWeight

UP_STEPS = 128
"""Steps of an INT8 ``lora_up`` in what the kernels take it for: ``parts.low_rank`` divides by as much."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedFactors:
    """lora_up:      (rank, out_features) in the inputs' type, or int8
    lora_down:       (rank, in_features), of the same type; None: the first ``rank`` channels
    component_scale: (rank,) float32, what ``x @ lora_down.T`` is multiplied with; None: the factors are not int8
    """

    lora_up: Tensor
    lora_down: Tensor | None
    component_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that they keep resident."""
        return sum(it.nbytes for it in (self.lora_up, self.lora_down, self.component_scale) if it is not None)


def pack_factors(correction: Correction | None, device: torch.device, dtype: torch.dtype) -> PackedFactors | None:
    """Factors of ``correction`` on ``device``, in ``dtype`` where they do not stay INT8; None: there are none."""
    if correction is None or not correction.rank:
        return None
    up, down = correction.lora_up, correction.lora_down
    if isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight) and _is_int8(up) and _is_int8(down):
        scale = up.scale.to(device, torch.float32) * down.scale.to(device, torch.float32) * UP_STEPS
        return PackedFactors(_signed(up, device), _signed(down, device), scale.flatten())
    dense_up, dense_down = dense_factors(correction)
    return PackedFactors(
        dense_up.T.to(device, dtype).contiguous(),
        None if dense_down is None else dense_down.to(device, dtype).contiguous(),
        None,
    )


def _is_int8(factor: QuantizedWeight) -> bool:
    """Whether it is symmetric INT8 with one scale per component."""
    scheme = factor.scheme
    return (scheme.format, scheme.num_bits, scheme.is_symmetric) == ("int", 8, True) and factor.scale.shape[1] == 1


def _signed(factor: QuantizedWeight, device: torch.device) -> Tensor:
    """Codes from -128 to 127 instead of 0 to 255: the highest bit, turned over."""
    return (factor.codes.to(device) ^ 128).view(torch.int8).contiguous()
