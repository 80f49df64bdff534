"""QERA: the correction that minimises the expected output error ``E ||x (W - What - C)^T||^2`` of the layer.

The expectation equals ``tr((E - C) R (E - C)^T)`` with R = E[x^T x], so the exact solution is the template's with the
full autocorrelation. The approximate one takes channels as uncorrelated and keeps the diagonal of R.
Source: QERA (arXiv 2410.06040), theorems 1 and 2; no damping, because the inverse-free form needs none.

Not in the paper, an option of the exact form: the outputs of a layer do not matter equally either. To second order the
loss of the network rises by ``1/2 tr(H E (x) E)``; with the Hessian taken as Fisher's, and that as a Kronecker product
of its output and its input side (K-FAC, arXiv 1503.05671), the first reduced to its diagonal, this is
``1/2 tr(D E R E^T)`` with D = diag(E[g_o^2]), g the gradient of the loss by the layer's output.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import with_config
from torch import Tensor

from ..config import ReconstructConfig
from ..scheme import STRICT
from ..types import InputStatistics, Statistic
from .base import LowRankReconstructor
from .statistics import require

_SMALLEST_GRADIENT = 1e-3


class QeraApprox(LowRankReconstructor):
    """Minimises the output error as if input channels were uncorrelated."""

    method: ClassVar[str] = "qera-approx"
    requires: frozenset[Statistic] = frozenset({Statistic.MEAN_SQUARE})

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """Mean squares of the input channels, (in_features,)."""
        return require(statistics, Statistic.MEAN_SQUARE, in_features)


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class QeraExactOptions:
    """Options of qera-exact.

    use_output_gradient: weigh output channels by their mean squared gradient, so that the loss of the network and not
        the output error of the layer is kept small; not in the paper
    """

    use_output_gradient: bool = False


class QeraExact(LowRankReconstructor):
    """Minimises the output error: no correction of the same rank has a smaller one on the calibration data."""

    method: ClassVar[str] = "qera-exact"
    requires: frozenset[Statistic] = frozenset({Statistic.AUTOCORRELATION})
    options_type: ClassVar[type[QeraExactOptions]] = QeraExactOptions
    options: QeraExactOptions

    def __init__(self, config: ReconstructConfig) -> None:
        super().__init__(config)
        if self.options.use_output_gradient:
            self.requires = self.requires | {Statistic.OUTPUT_GRADIENT}

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """Autocorrelation of the inputs, (in_features, in_features)."""
        return require(statistics, Statistic.AUTOCORRELATION, in_features)

    def output_weighting(self, statistics: InputStatistics, out_features: int) -> Tensor | None:
        """Mean squared gradients by the outputs, (out_features,), if asked for.

        From a few sequences some of them are hardly seen at all: none counts less than a thousandth of the mean.
        """
        if not self.options.use_output_gradient:
            return None
        gradient = require(statistics, Statistic.OUTPUT_GRADIENT, out_features)
        return gradient.clamp(min=_SMALLEST_GRADIENT * float(gradient.mean()))
