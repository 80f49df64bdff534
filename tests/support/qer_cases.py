"""What QER merges, by the definitions, one weight at a time in exact numbers; and small layers to train."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from models.config import Option, ReconstructConfig
from models.quant.grid import quantize
from models.quant.rtn import quantize_rtn
from models.reconstruct.qer import Qer
from models.scheme import QuantScheme
from models.train.codes import Penalties, TrainableCodes
from models.types import InputStatistics, QuantizedWeight

OFF = 31
SCHEMES = [
    QuantScheme(4, -1),
    QuantScheme(4, 32),
    QuantScheme(3, 16, is_symmetric=True),
    QuantScheme(2, -1, is_symmetric=True),
    QuantScheme(8, 32),
]
HALF = Fraction(1, 2)


def qer(merge: str = "fixed-point", rank: int = 4, **options: Option) -> Qer:
    return Qer(ReconstructConfig("qer", rank, options={"merge": merge, **options}))


def nearest(value: Fraction) -> int:
    """The nearest integer, halves upwards."""
    return math.floor(value + HALF)


def shifted(product: int, shift: int) -> int:
    """``product * 2^-shift``, rounded; off is off."""
    return 0 if shift >= OFF else nearest(Fraction(product) / Fraction(2) ** shift)


def fixed_point(code: int, fraction: int, product: int, shift: int, bits: int) -> int:
    """V of a weight at ``code + fraction / 2^bits``, whose product is first rounded to the steps of the fraction."""
    if shift >= OFF:
        return code
    return nearest(code + Fraction(fraction + shifted(product, shift - bits), 2**bits))


def ternary(code: int, product: int, threshold: Fraction) -> int:
    """V of LoTA-QAF's merge."""
    return code + (1 if product > threshold else -1 if product < -threshold else 0)


def clamped(value: int, num_bits: int) -> int:
    return min(max(value, 0), (1 << num_bits) - 1)


def product_of(up: list[list[int]], down: list[list[int]]) -> list[list[int]]:
    """``up @ down`` in Python's integers."""
    columns = list(zip(*down, strict=True))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in up]


def each(function: Callable[..., int], *matrices: Tensor | list[list[int]]) -> list[list[int]]:
    """``function`` of the entries of matrices that broadcast along their rows, one weight at a time."""
    plain = [matrix.tolist() if isinstance(matrix, Tensor) else matrix for matrix in matrices]
    width = max(len(matrix[0]) for matrix in plain)
    rows = [[row * (width // len(row)) for row in matrix] for matrix in plain]
    return [
        [function(*entries) for entries in zip(*row, strict=True)] for row in zip(*rows, strict=True)
    ]  # fmt: skip


def off_grid_layer(scheme: QuantScheme, shape: tuple[int, int] = (12, 64)) -> tuple[Tensor, QuantizedWeight]:
    """A weight, and codes on a grid that ends before it does, some of which are not the nearest (as GPTQ's)."""
    weight = torch.randn(shape) * 0.05 + 0.01
    spanning = quantize_rtn(weight, scheme)
    narrow = quantize(weight, (spanning.scale * 0.7).half(), spanning.zero_point, scheme)
    moved = narrow.codes.int() + torch.randint(-1, 2, shape)
    codes = moved.clamp(0, scheme.max_code).to(torch.uint8)
    return weight, QuantizedWeight(codes, narrow.scale, narrow.zero_point, scheme)


def input_statistics(num_channels: int, num_tokens: int = 200) -> InputStatistics:
    """Of inputs that share a few directions and differ in size by two orders of magnitude."""
    mixing = torch.randn(num_channels, num_channels, dtype=torch.float64) / num_channels**0.5
    mixing += torch.randn(num_channels, 4, dtype=torch.float64) @ torch.randn(4, num_channels, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, num_channels, dtype=torch.float64)
    x = torch.randn(num_tokens, num_channels, dtype=torch.float64) @ mixing * sizes
    return InputStatistics(num_tokens, autocorrelation=x.T @ x / num_tokens, mean_square=x.square().mean(0))


def whole(codes: TrainableCodes) -> tuple[Tensor, Penalties]:
    """What ``codes`` gives some rows at a time, one below the other: codes with gradients, and what the merge loses."""
    factors = codes.factors()
    parts = [codes.part(rows, *factors) for rows in codes.row_slices]
    lost = [(penalties.rounding, penalties.overflow) for _codes, penalties in parts]
    rounding, overflow = ([it for it in column if it is not None] for column in zip(*lost, strict=True))
    return (
        torch.cat([merged for merged, _penalties in parts]),
        Penalties(torch.cat(rounding) if rounding else None, torch.cat(overflow) if overflow else None),
    )
