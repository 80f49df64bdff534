"""ZeroQuant-V2's low-rank compensation (LoRC): the plain truncated SVD of the weight error.

The factors share the singular values, ``U sqrt(Sigma)`` and ``sqrt(Sigma) V^T``, so that both have the same range. All
factors are stored like this here, up to a power of two: beside LQER's plain form the product is the same.
Source: ZeroQuant-V2 (arXiv 2303.08302), section 5.
"""

from typing import ClassVar

from torch import Tensor

from ..types import InputStatistics
from .base import LowRankReconstructor


class ZeroQuantV2(LowRankReconstructor):
    """Minimises the weight error; looks at no data."""

    method: ClassVar[str] = "zeroquant-v2"

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """None: every input channel counts the same."""
        return None
