"""No correction: the base quantizer alone, the row that every table of results starts with."""

from typing import ClassVar

from torch import Tensor

from ..config import ReconstructConfig
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic
from .base import check_rank
from .options import NoOptions, parse_options


class NoReconstruction:
    """Quantizes and stops there; the configured rank is that of a refit, if there is to be one."""

    method: ClassVar[str] = "none"
    requires: frozenset[Statistic] = frozenset()

    def __init__(self, config: ReconstructConfig) -> None:
        parse_options(config, NoOptions)
        self._config = config

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError when the shape of the weight of layer ``where`` does not suit a refit; else any is fine."""
        if self._config.refit:
            check_rank(self._config.rank, self._config.factor_dtype, (out_features, in_features), where)

    def channel_order(self, weight: Tensor, statistics: InputStatistics) -> Tensor | None:
        """None: the order of the input channels does not matter."""
        return None

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Codes of ``weight`` (out_features, in_features), without a correction."""
        return LinearWeights(quantize(weight))
