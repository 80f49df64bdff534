"""Block floating point: values under one shared power of two, MXINT and MXFP4.

MXINT is sign and a magnitude of ``num_bits - 1`` bits, in steps of ``2**(e - (num_bits - 2))``. As codes it is the
symmetric integer grid with a power of two for a scale, without its most negative code. The papers differ in e:
``floor(log2(absmax))`` (QERA, arXiv 2410.06040: the exponent field of the largest value), or ``ceil(log2(absmax))``
with steps of ``2**(e - (num_bits - 1))`` (LQER, arXiv 2402.02446). The two grids are the same unless absmax is a power
of two: then LQER's step is half as long, and its largest magnitude, ``1 - 2**-(num_bits - 1)`` of absmax, clips it.

MXFP4 is E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) in blocks of 32 under ``2**(floor(log2(absmax)) - 2)``.
Source: OCP Microscaling Formats specification 1.0, sections 5.3.3 and 6.3.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..scheme import ExponentRule, QuantScheme

MIN_EXPONENT = -126
MAX_EXPONENT = 127
_BFLOAT16_MANTISSA_BITS = 7
_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA_BITS = 23
_FLOAT32_EXPONENT = 0xFF << _FLOAT32_MANTISSA_BITS
_E2M1_LARGEST_EXPONENT = 2
_E2M1_LARGEST = 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(_E2M1))


def choose_scale(groups: Tensor, scheme: QuantScheme) -> Tensor:
    """Scales (rows, num_groups) bfloat16, powers of two, of ``groups`` (rows, num_groups, group_length) float32."""
    return block_scale(groups.abs().amax(-1), scheme.format, scheme.num_bits, scheme.exponent).to(torch.bfloat16)


def block_scale(absmax: Tensor, number_format: str, num_bits: int, rule: ExponentRule) -> Tensor:
    """Step (``mxint``) or scale (``mxfp4``) of blocks with largest magnitudes ``absmax``; 1 for a block of zeros."""
    mantissa, exponent = torch.frexp(absmax.float())  # absmax = mantissa * 2**exponent, mantissa in [0.5, 1)
    if number_format == "mxfp4":
        shared = exponent - 1 - _E2M1_LARGEST_EXPONENT
    elif rule == "floor":
        shared = exponent - 1 - (num_bits - 2)
    else:
        shared = exponent - (mantissa == 0.5).to(exponent.dtype) - (num_bits - 1)
    # As bits, because exp2 of an integer is a power of two on some devices only.
    bits = (shared.clamp(MIN_EXPONENT, MAX_EXPONENT) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS
    return torch.where(absmax == 0, 1.0, bits.to(torch.int32).view(torch.float32))


def to_exponents(scale: Tensor) -> Tensor:
    """Bfloat16 powers of two from ``2**-126`` to ``2**127`` as the byte e that stands for ``2**(e - 127)`` (E8M0)."""
    return (scale.contiguous().view(torch.int16) >> _BFLOAT16_MANTISSA_BITS).to(torch.uint8)


def from_exponents(exponents: Tensor) -> Tensor:
    """The bfloat16 powers of two that E8M0 bytes from 1 to 254 stand for; 0 and 255 give 0 and infinity."""
    return (exponents.to(torch.int16) << _BFLOAT16_MANTISSA_BITS).view(torch.bfloat16)


def round_e2m1(steps: Tensor) -> Tensor:
    """Nearest E2M1 values of ``steps`` (float32): ``decode_e2m1(encode_e2m1(steps))`` without the detour over codes.

    Values lie 0.5 apart below 2, 1 apart up to 4 and 2 apart above: half the power of two below them. Mantissas are
    even at the even multiples of that spacing, which is what rounding half to even picks.
    """
    power_of_two = steps.view(torch.int32).bitwise_and(_FLOAT32_EXPONENT).view(torch.float32)
    spacing = power_of_two.mul_(0.5).clamp_(0.5, 2.0)
    return (steps / spacing).round_().mul_(spacing).clamp_(-_E2M1_LARGEST, _E2M1_LARGEST)


def encode_e2m1(steps: Tensor) -> Tensor:
    """Nearest E2M1 codes (uint8, sign in bit 3) of ``steps``; ties go to the even mantissa, overflow saturates."""
    magnitude = steps.abs().contiguous()
    bounds = steps.new_tensor(_E2M1_BOUNDS)
    # Halfway, the lower neighbour's code is even or the upper one's: alternately, starting with the lower.
    below = torch.bucketize(magnitude, bounds)
    above = torch.bucketize(magnitude, bounds, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * (steps < 0)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of E2M1 ``codes``, float32."""
    magnitudes = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), dtype=torch.float32, device=codes.device)
    return magnitudes[codes.long()]
