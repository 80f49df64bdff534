"""ZeroQuant-V2's low-rank compensation (LoRC): the plain truncated SVD of the weight error.

The factors share the singular values, ``U sqrt(Sigma)`` and ``sqrt(Sigma) V^T``: both have the same range, which suits
factors that are quantized or cast to a narrow format.
Source: ZeroQuant-V2 (arXiv 2303.08302), section 5.
"""

from typing import ClassVar

from torch import Tensor

from ..types import InputStatistics, Statistic
from .base import LowRankReconstructor


class ZeroQuantV2(LowRankReconstructor):
    """Minimises the weight error; looks at no data."""

    method: ClassVar[str] = "zeroquant-v2"
    requires: ClassVar[frozenset[Statistic]] = frozenset()
    is_balanced: ClassVar[bool] = True

    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """None: every input channel counts the same."""
        return None
