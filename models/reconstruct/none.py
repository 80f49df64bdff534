"""No correction: the base quantizer alone, the row that every table of results starts with."""

from typing import ClassVar

from torch import Tensor

from ..config import ReconstructConfig
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic


class NoReconstruction:
    """Quantizes and stops there; the configured rank is not used."""

    method: ClassVar[str] = "none"
    requires: ClassVar[frozenset[Statistic]] = frozenset()

    def __init__(self, config: ReconstructConfig) -> None:
        del config

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Every shape that can be quantized is fine."""

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Codes of ``weight`` (out_features, in_features), without a correction."""
        return LinearWeights(quantize(weight))
