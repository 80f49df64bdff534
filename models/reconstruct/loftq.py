"""LoftQ: quantize what the low-rank term leaves over, then fit that term again, in turns.

    Q = quantize(W - A B),   A B = SVD_k(W - Q),   from A B = 0, ``iterations`` times.

The last iterate is kept, as published. The weight error falls from one to the next, the error of the layer's outputs
need not (QERA, arXiv 2410.06040, figure 1): hence one iteration by default, which is ZeroQuant-V2's correction.
Source: LoftQ (arXiv 2310.08659), algorithm 1.

Not in the paper: ``is_activation_aware`` runs the same loop with QERA-exact's approximation in place of the plain SVD
and keeps the iterate with the least output error ``tr(E R E^T)``; the first one is QERA-exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import with_config
from torch import Tensor

from ..config import ReconstructConfig
from ..errors import SchemeError
from ..quant.factors import store_factors
from ..scheme import STRICT
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic
from .base import MethodBase, residual
from .linalg import weighted_low_rank
from .loss import weighted_square
from .statistics import require


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LoftqOptions:
    """Options of loftq.

    iterations:          how often codes and factors are fitted in turns
    is_activation_aware: fit the factors to the outputs of the layer in place of its weight, and keep the best iterate
    """

    iterations: int = 1
    is_activation_aware: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise SchemeError(f"iterations is {self.iterations}; choose 1 or more")


class Loftq(MethodBase):
    """Alternates between the codes and the factors; each step takes the other's result as given."""

    method: ClassVar[str] = "loftq"
    options_type: ClassVar[type[LoftqOptions]] = LoftqOptions
    options: LoftqOptions

    def __init__(self, config: ReconstructConfig) -> None:
        super().__init__(config)
        if self.options.is_activation_aware:
            self.requires = frozenset({Statistic.AUTOCORRELATION})

    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        is_aware = self.options.is_activation_aware
        weighting = require(statistics, Statistic.AUTOCORRELATION, weight.shape[1]) if is_aware else None
        product = torch.zeros_like(weight)
        best, least = None, float("inf")
        for _ in range(self.options.iterations):
            quantized = quantize(weight - product)
            error = residual(weight, quantized)
            lora_up, lora_down = weighted_low_rank(error, weighting, self.rank)
            product = (lora_up @ lora_down).to(weight.dtype)
            loss = weighted_square(error - product, weighting) if is_aware else 0.0
            if best is None or not is_aware or loss < least:
                correction = store_factors(lora_up, lora_down, self.factor_dtype, error, weighting)
                best, least = (quantized, correction), loss
        assert best is not None  # noqa: S101 - there is at least one iteration
        return LinearWeights(*best)
