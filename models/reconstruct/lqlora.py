"""LQ-LoRA: a low-rank part of the weight first, then the codes of the rest, in turns, in a Fisher-weighted norm.

    L1 L2 = SVD_k(W - Q),   Q = quantize(W - L1 L2),   from Q = 0, until the error rises; the iterate before is kept.

The norm is ``||D_row (W - Q - L1 L2) D_col||``, where D_row^2 and D_col^2 are the row and column means of sqrt(F) and F
is the Fisher information of the weight: SVD of the scaled matrix, factors scaled back. In the terms of ``linalg``:
D = diag(row means), R = diag(column means).
Source: LQ-LoRA (arXiv 2311.12023), algorithm 1 and section 3.2. Its choice of bits per matrix is the build's budget.
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
from .base import MethodBase, residual, stored_product
from .linalg import weighted_low_rank
from .loss import weighted_square
from .statistics import require_fisher


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LqLoraOptions:
    """Options of lq-lora.

    max_iterations: of factors and codes in turns; the error usually rises before
    use_fisher:     False: the plain norm, without gradients
    """

    max_iterations: int = 5
    use_fisher: bool = True

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise SchemeError(f"max_iterations is {self.max_iterations}; choose 1 or more")


class LqLora(MethodBase):
    """Decomposes the weight into factors and codes where gradients say that it matters."""

    method: ClassVar[str] = "lq-lora"
    options_type: ClassVar[type[LqLoraOptions]] = LqLoraOptions
    options: LqLoraOptions

    def __init__(self, config: ReconstructConfig) -> None:
        super().__init__(config)
        if self.options.use_fisher:
            self.requires = frozenset({Statistic.FISHER})

    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        rows, columns = require_fisher(statistics, *weight.shape) if self.options.use_fisher else (None, None)
        best, least = None, float("inf")
        error = weight
        for _ in range(self.options.max_iterations):
            lora_up, lora_down = weighted_low_rank(error, columns, self.rank, rows)
            correction = store_factors(lora_up, lora_down, self.factor_dtype)
            product = stored_product(correction, weight.dtype)  # as stored: the codes make up for its rounding
            quantized = quantize(weight - product)
            error = residual(weight, quantized)
            loss = _loss(error - product, columns, rows)
            if best is not None and loss >= least:
                break
            best, least = (quantized, correction), loss
        assert best is not None  # noqa: S101 - there is at least one iteration
        return LinearWeights(*best)


def _loss(error: Tensor, columns: Tensor | None, rows: Tensor | None) -> float:
    return weighted_square(error if rows is None else error * torch.sqrt(rows)[:, None], columns)
