"""Low-rank factors as the kernels run them: 8-bit codes, a scale per 32 components or per block of input channels.

The kernels append ``lora_up`` to each strip as further blocks of the same sum; ``lora_down`` is a matrix of its own.
A scale of ``lora_up`` is shared by 32 components, so beside a ``lora_down`` the components are first made equally large
in ``lora_up``: each is then rounded in proportion to its own contribution. 8 bits cost about half a percent of each
factor, on a term that is itself a correction.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant.grid import dense_factors
from ...types import Correction

RANK_BLOCK = 32
ZERO_CODE = 128
_LARGEST = 127
_MANTISSA_STEPS = 1 << 11


@dataclass(frozen=True, slots=True, eq=False)
class ByteCodes:
    """``value = (codes - 128) * scale`` of each block of channels.

    codes: (rows, columns) uint8, values 1..255
    scale: (rows, columns / block) float32 of eleven significant bits, 0 for a block of zeros
    """

    codes: Tensor
    scale: Tensor

    @property
    def block(self) -> int:
        """Channels per scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def values(self) -> Tensor:
        """What the codes stand for, (rows, columns) float32."""
        signed = self.codes.float() - ZERO_CODE
        return (signed.view(*self.scale.shape, -1) * self.scale[..., None]).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class ByteFactors:
    """Both with the rank filled up to a multiple of 32, ``padded``.

    lora_up:   (out_features, padded)
    lora_down: (padded, in_features); None: the first channels
    """

    rank: int
    lora_up: ByteCodes
    lora_down: ByteCodes | None


def to_bytes(values: Tensor, block: int) -> ByteCodes:
    """``values`` (rows, columns) rounded to 8 bits, symmetric, a scale per ``block`` columns, which divide them."""
    groups = values.float().reshape(values.shape[0], -1, block)
    scale = _short(groups.abs().amax(-1) / _LARGEST)
    steps = groups / torch.where(scale == 0, 1.0, scale)[..., None]
    codes = steps.round_().clamp_(-_LARGEST, _LARGEST).add_(ZERO_CODE).to(torch.uint8)
    return ByteCodes(codes.flatten(1), scale)


def _short(scale: Tensor) -> Tensor:
    """``scale`` with the eleven significant bits of float16, which strips store next to a common power of two."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * _MANTISSA_STEPS).ceil_().div_(_MANTISSA_STEPS), exponent)


def byte_factors(correction: Correction, block: int) -> ByteFactors:
    """Both factors of ``correction`` in 8 bits, ``lora_down`` with one scale per ``block`` input channels."""
    rank = correction.rank
    missing = -rank % RANK_BLOCK
    lora_up, lora_down = dense_factors(correction)
    lora_up = lora_up.float()
    if lora_down is None:
        return ByteFactors(rank, to_bytes(F.pad(lora_up, (0, missing)), RANK_BLOCK), None)
    sizes = lora_up.norm(dim=0)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    up = to_bytes(F.pad(lora_up / sizes, (0, missing)), RANK_BLOCK)
    return ByteFactors(rank, up, to_bytes(F.pad(lora_down.float() * sizes[:, None], (0, 0, 0, missing)), block))
