"""Rounding of activations in registers: the grids of ``quant.activation``, operation by operation.

Same divisions (rounded to nearest, where Triton's ``/`` is an approximation), same order, half to even: the steps are
those of ``quantize_activations``. ``groups`` is (rows, groups, length) float32, what belongs to a group
(rows, groups, 1).
"""

import triton
import triton.language as tl

_TINY = tl.constexpr(2.0**-126)
_HALF_EVEN = tl.constexpr(1.5 * 2.0**23)
_MIN_EXPONENT = tl.constexpr(-126)
_BIAS = tl.constexpr(127)
_MANTISSA_BITS = tl.constexpr(23)
_MANTISSA = tl.constexpr((1 << 23) - 1)


@triton.jit
def group_range(groups):
    """Lowest value or 0, highest or 0, and 0, or not a number where a value is not finite."""
    low = tl.minimum(tl.min(groups, 2, keep_dims=True), 0.0)
    high = tl.maximum(tl.max(groups, 2, keep_dims=True), 0.0)
    return low, high, tl.sum(groups * 0.0, 2, keep_dims=True)


@triton.jit
def choose_grid(
    low,
    high,
    clip_ratio,
    FORMAT: tl.constexpr,
    NUM_BITS: tl.constexpr,
    IS_SYMMETRIC: tl.constexpr,
    IS_CEIL: tl.constexpr,
):
    """Scale, and the lowest step of the grid, of groups that span ``low`` to ``high``."""
    largest: tl.constexpr = (1 << (NUM_BITS - 1)) - 1
    max_code: tl.constexpr = (1 << NUM_BITS) - 1
    if FORMAT == "mxint":
        scale = _power_of_two(tl.maximum(high, -low), NUM_BITS, IS_CEIL)
        lowest = tl.zeros_like(scale) - largest
    elif IS_SYMMETRIC:
        absmax = tl.maximum(high, -low) * clip_ratio
        scale = tl.maximum(tl.div_rn(absmax, tl.zeros_like(absmax) + largest), _TINY)
        lowest = tl.zeros_like(scale) - largest
    else:
        low, high = low * clip_ratio, high * clip_ratio
        divisor = tl.zeros_like(low) + max_code
        scale = tl.maximum(tl.div_rn(high, divisor) - tl.div_rn(low, divisor), _TINY)
        lowest = round_half_even(tl.maximum(tl.div_rn(low, scale), -max_code))
    return scale, lowest


@triton.jit
def round_to_grid(groups, scale, lowest, NUM_BITS: tl.constexpr, IS_SYMMETRIC: tl.constexpr):
    """Nearest steps from zero, integers as float32. Limits are whole steps: clamped before rounding is as after it."""
    highest = -lowest if IS_SYMMETRIC else lowest + ((1 << NUM_BITS) - 1)
    return round_half_even(tl.minimum(tl.maximum(tl.div_rn(groups, scale), lowest), highest))


@triton.jit
def round_half_even(values):
    """Nearest integers of ``values`` (below 2**22): the sum has no bits left for fractions."""
    return (values + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def _power_of_two(absmax, NUM_BITS: tl.constexpr, IS_CEIL: tl.constexpr):
    """``quant.mx.block_scale`` of MXINT from the bits of ``absmax``; subnormal numbers are below the least exponent."""
    bits = absmax.to(tl.int32, bitcast=True)
    exponent = (bits >> _MANTISSA_BITS) - _BIAS
    if IS_CEIL:
        is_power = (bits & _MANTISSA) == 0
        exponent = exponent + 1 - is_power.to(tl.int32) - (NUM_BITS - 1)
    else:
        exponent = exponent - (NUM_BITS - 2)
    exponent = tl.minimum(tl.maximum(exponent, _MIN_EXPONENT), _BIAS)
    scale = ((exponent + _BIAS) << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    return tl.where(absmax == 0.0, 1.0, scale)
