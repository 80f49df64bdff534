"""LQER: the truncated SVD of the weight error, plain or scaled by the size of each input channel (L2QER).

L2QER multiplies channel j of the error by ``s_j = a_j / sqrt(min a * max a)``, ``a = clamp(mean |x_j|, 1e-4)``, before
the SVD and divides the factor by it afterwards. In the terms of ``linalg``: R = diag(s^2).
Source: LQER (arXiv 2402.02446), section 3, with the statistic as its published code accumulates it.
"""

from typing import ClassVar

from torch import Tensor

from ..types import InputStatistics, Statistic
from .base import LowRankReconstructor
from .statistics import require

_SMALLEST_MEAN_ABS = 1e-4


class Lqer(LowRankReconstructor):
    """Minimises the weight error; looks at no data."""

    method: ClassVar[str] = "lqer"

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """None: every input channel counts the same."""
        return None


class L2qer(LowRankReconstructor):
    """Minimises the weight error with each input channel scaled by its mean magnitude."""

    method: ClassVar[str] = "l2qer"
    requires: frozenset[Statistic] = frozenset({Statistic.MEAN_ABS})

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """Squares of the channel scales, (in_features,)."""
        mean_abs = require(statistics, Statistic.MEAN_ABS, in_features).clamp(min=_SMALLEST_MEAN_ABS)
        return mean_abs.square() / (mean_abs.min() * mean_abs.max())
