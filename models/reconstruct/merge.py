"""Merges of low-rank integers into the codes of a weight: no dequantization, no second quantization.

All values are integers in int32, in units of the base's step; ``P = A B`` is the product of the integer factors, and

    fixed-point    V = (2^f codes + fraction + round_shift(P, t - f) + 2^(f-1)) >> f
    shift          V = codes + round_shift(P, t)          t per output channel, 31 switches one off; t = 0: direct
    ternary        V = codes + sign(P) [|P| > omega]      (LoTA-QAF, arXiv 2505.18724, eq. 5)

``codes' = clamp(V)`` is what ships, with the base's scales and zero points: what the clamp cuts off, the overflow, is
all that such a merge loses. ``fraction`` is what rounding to the codes left over, in steps of 2^-f.
``round_shift(P, n)`` is ``(P + 2^(n-1)) >> n``, an addition and an arithmetic shift: the nearest integer, halves
upwards. ``torch.round`` takes halves to even and would be another function.

The arithmetic is our own; QER's publication (CloudCom 2025) is known by its abstract only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SchemeError

SWITCHED_OFF = 31
"""A shift that takes every product to zero."""

_EXACT_IN_FLOAT32 = 1 << 24
_WITHIN_INT32 = 1 << 30


@dataclass(frozen=True, slots=True)
class IntegerBase:
    """What low-rank integers are merged into.

    codes:         (out_features, in_features) int32, 0 .. max_code
    fraction:      (out_features, in_features) int32, ``-2^(f-1) .. 2^(f-1) - 1``; None: the base keeps none
    fraction_bits: f
    max_code:      the largest code
    """

    codes: Tensor
    fraction: Tensor | None
    fraction_bits: int
    max_code: int


def integer_base(codes: Tensor, position: Tensor, fraction_bits: int, max_code: int) -> IntegerBase:
    """The base of ``codes``, with ``fraction_bits`` of what they miss of ``position``.

    A weight that lies further from its code than half a step (the grid ends before it, or GPTQ chose another code)
    keeps as much of the distance as the fraction holds: the start is always exactly ``codes``.

    Args:
        codes: (out_features, in_features) uint8
        position: the dense weight on the grid, ``weight / scale + zero_point``, same shape
        fraction_bits: 0: no fraction
        max_code: the largest code
    """
    whole = codes.to(torch.int32)
    if fraction_bits == 0:
        return IntegerBase(whole, None, 0, max_code)
    half = 1 << (fraction_bits - 1)
    missed = (position.double() - codes) * (1 << fraction_bits)
    fraction = torch.floor(missed + 0.5).clamp_(-half, half - 1).to(torch.int32)
    return IntegerBase(whole, fraction, fraction_bits, max_code)


def round_shift(values: Tensor, shift: Tensor | int) -> Tensor:
    """``values * 2^-shift`` to the nearest integer, halves upwards.

    Args:
        values: int32, less than 2^30 in magnitude, also after a negative shift
        shift: an integer, where negative ones multiply, or an int32 tensor of 0 and more that broadcasts;
            ``SWITCHED_OFF`` and above gives zero
    """
    if isinstance(shift, int):
        if shift >= SWITCHED_OFF:
            return torch.zeros_like(values)
        if shift <= 0:
            return values << -shift
        return (values + (1 << (shift - 1))) >> shift
    bounded = shift.clamp(0, SWITCHED_OFF - 1)
    half = torch.where(bounded > 0, 1 << (bounded - 1).clamp(min=0), 0)
    return torch.where(shift >= SWITCHED_OFF, 0, (values + half) >> bounded)


def fixed_point_merge(base: IntegerBase, product: Tensor, shift: int) -> Tensor:
    """V of the merge on a fixed-point base: int32, not clamped.

    Args:
        base: with a fraction
        product: (out_features, in_features) int32, P
        shift: t, one step of P moves a weight by ``2^-t`` of a level; ``SWITCHED_OFF``: not at all
    """
    assert base.fraction is not None  # noqa: S101 - the caller made the base for this merge
    if shift >= SWITCHED_OFF:
        return base.codes
    bits = base.fraction_bits
    moved = (base.codes << bits) + base.fraction + round_shift(product, shift - bits)
    return (moved + (1 << (bits - 1))) >> bits


def shift_merge(base: IntegerBase, product: Tensor, shift: Tensor | int) -> Tensor:
    """V of the merge on an integer base: int32, not clamped; ``shift`` (out_features, 1) int32, or one for all."""
    return base.codes + round_shift(product, shift)


def ternary_merge(base: IntegerBase, product: Tensor, threshold: float) -> Tensor:
    """V of LoTA-QAF's merge: a step where ``|product|`` is above ``threshold``; int32, not clamped."""
    return base.codes + torch.sign(product) * (product.abs() > threshold)


def clamp_codes(values: Tensor, base: IntegerBase) -> Tensor:
    """V within the grid: uint8 codes."""
    return values.clamp(0, base.max_code).to(torch.uint8)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of integers held in float32, as int32.

    Exact: every partial sum is an integer below 2^24, which float32 holds, in whatever order it is taken
    (``check_exact``). CPUs and GPUs have no fast int32 product, but all have a float32 one.
    """
    with torch.autocast(left.device.type, enabled=False):
        return (left @ right).to(torch.int32)


def check_exact(rank: int, largest_factor: int, where: str, *, left_shift: int = 0) -> None:
    """Check that products of factors up to ``largest_factor`` are exact in float32, and merges of them in int32.

    Args:
        rank: of the factors
        largest_factor: Q
        where: the layer, for the message
        left_shift: by which the merge multiplies products: ``f - t`` of a fixed-point base with more bits than t

    Raises:
        SchemeError: ``rank`` times the square of Q reaches 2^24, or 2^30 after ``left_shift``.
    """
    largest = rank * largest_factor**2
    if largest >= _EXACT_IN_FLOAT32:
        raise SchemeError(
            f"{where}: products of rank {rank} with factors up to {largest_factor} reach {largest}, and float32 is "
            f"exact below {_EXACT_IN_FLOAT32}; choose a smaller rank or fewer factor_bits"
        )
    if largest << left_shift >= _WITHIN_INT32:
        raise SchemeError(
            f"{where}: products of rank {rank} with factors up to {largest_factor}, shifted left by {left_shift}, "
            "leave int32; choose a shift closer to fraction_bits, or above it"
        )
