"""QERA: the correction that minimises the expected output error ``E ||x (W - What - C)^T||^2`` of the layer.

The expectation equals ``tr((E - C) R (E - C)^T)`` with R = E[x^T x], so the exact solution is the template's with the
full autocorrelation. The approximate one takes channels as uncorrelated and keeps the diagonal of R.
Source: QERA (arXiv 2410.06040), theorems 1 and 2; no damping, because the inverse-free form needs none.
"""

from typing import ClassVar

from torch import Tensor

from ..types import InputStatistics, Statistic
from .base import LowRankReconstructor, require


class QeraApprox(LowRankReconstructor):
    """Minimises the output error as if input channels were uncorrelated."""

    method: ClassVar[str] = "qera-approx"
    requires: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MEAN_SQUARE})

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """Mean squares of the input channels, (in_features,)."""
        return require(statistics, Statistic.MEAN_SQUARE, in_features)


class QeraExact(LowRankReconstructor):
    """Minimises the output error: no correction of the same rank has a smaller one on the calibration data."""

    method: ClassVar[str] = "qera-exact"
    requires: ClassVar[frozenset[Statistic]] = frozenset({Statistic.AUTOCORRELATION})

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """Autocorrelation of the inputs, (in_features, in_features)."""
        return require(statistics, Statistic.AUTOCORRELATION, in_features)
