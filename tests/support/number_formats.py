"""Number formats by their definitions, one Python number at a time and exactly: what the tensor code is compared with.

Written from the papers (and, for E2M1, from the bit fields), not from the code under test.
"""

from collections.abc import Sequence
from fractions import Fraction

from models.scheme import ExponentRule


def floor_log2(value: Fraction) -> int:
    """Largest e with ``2**e <= value``, by counting."""
    exponent = 0
    while Fraction(2) ** exponent > value:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    return exponent


def ceil_log2(value: Fraction) -> int:
    """Smallest e with ``value <= 2**e``."""
    exponent = floor_log2(value)
    return exponent if Fraction(2) ** exponent == value else exponent + 1


def mxint(block: Sequence[float], width: int, rule: ExponentRule) -> list[Fraction]:
    """A block in MXINT: LQER's ``block_fp`` quantizer for ``ceil``, QERA's ``mxint`` for ``floor``."""
    values = [Fraction(value) for value in block]
    largest = max(map(abs, values))
    if largest == 0:
        return values
    most = 2 ** (width - 1) - 1
    if rule == "ceil":
        exponent = ceil_log2(largest)
        mantissas = [round(abs(value) / Fraction(2) ** exponent * 2 ** (width - 1)) for value in values]
        step = Fraction(2) ** exponent / 2 ** (width - 1)
    else:
        step = Fraction(2) ** (floor_log2(largest) - (width - 2))
        mantissas = [round(abs(value) / step) for value in values]
    return [
        (-1 if value < 0 else 1) * min(mantissa, most) * step for value, mantissa in zip(values, mantissas, strict=True)
    ]


def e2m1_values() -> list[tuple[Fraction, int]]:
    """Every non-negative E2M1 number with its mantissa bit: 2 exponent bits with bias 1, subnormals at exponent 0."""
    numbers = []
    for exponent in range(4):
        for mantissa in range(2):
            if exponent == 0:
                numbers.append((Fraction(mantissa, 2), mantissa))
            else:
                numbers.append((Fraction(2) ** (exponent - 1) * (1 + Fraction(mantissa, 2)), mantissa))
    return numbers


def nearest_e2m1(value: Fraction) -> Fraction:
    """The nearest of all E2M1 numbers; of two, the one with an even mantissa; beyond the largest, the largest."""
    numbers = e2m1_values()
    number, _ = min(numbers, key=lambda it: (abs(it[0] - abs(value)), it[1]))
    return -number if value < 0 else number


def mxfp4(block: Sequence[float]) -> list[Fraction]:
    """A block in MXFP4: E2M1 under ``2**(floor(log2(max)) - 2)`` (OCP Microscaling 1.0, section 6.3)."""
    values = [Fraction(value) for value in block]
    largest = max(map(abs, values))
    if largest == 0:
        return values
    scale = Fraction(2) ** (floor_log2(largest) - 2)
    return [nearest_e2m1(value / scale) * scale for value in values]


def int_symmetric(group: Sequence[float], num_bits: int, clip_ratio: float = 1.0) -> list[float]:
    """A group on the symmetric integer grid, in float64; what lies beyond the grid takes its nearer end."""
    most = 2 ** (num_bits - 1) - 1
    scale = clip_ratio * max(abs(value) for value in group) / most
    return [scale * max(-most, min(most, round(value / scale))) if scale else 0.0 for value in group]


def int_asymmetric(group: Sequence[float], num_bits: int, clip_ratio: float = 1.0) -> list[float]:
    """A group on the asymmetric integer grid from its minimum to its maximum, zero inside, in float64.

    With a clip ratio, from that share of its minimum to that share of its maximum.
    """
    low, high = clip_ratio * min(0.0, *group), clip_ratio * max(0.0, *group)
    most = 2**num_bits - 1
    scale = (high - low) / most
    if not scale:
        return [0.0 for _ in group]
    zero_point = round(-low / scale)
    codes = [min(max(round(value / scale) + zero_point, 0), most) for value in group]
    return [scale * (code - zero_point) for code in codes]
