"""Statistics of a linear layer's inputs, accumulated batch by batch.

Sums are kept in float64: a float32 sum over a million tokens loses the small eigenvalues of the autocorrelation, on
which QERA-exact depends. Each batch's own product is a float32 GEMM (QERA, arXiv 2410.06040, appendix A.7).
"""

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..types import InputStatistics, Statistic


class StatisticsAccumulator:
    """Accumulates what ``requires`` names, and nothing more, for inputs of ``num_features`` channels."""

    def __init__(self, num_features: int, requires: frozenset[Statistic], device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self._sums: dict[Statistic, Tensor] = {}
        shapes = {Statistic.AUTOCORRELATION: (num_features, num_features)}
        for statistic in sorted(requires):
            shape = shapes.get(statistic, (num_features,))
            self._sums[statistic] = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add one calibration batch ``inputs`` (num_tokens, num_features)."""
        inputs = inputs.float()
        self.num_tokens += inputs.shape[0]
        for statistic, total in self._sums.items():
            if statistic is Statistic.AUTOCORRELATION:
                total.add_(inputs.T @ inputs)
            elif statistic is Statistic.MEAN_SQUARE:
                total.add_(inputs.square().sum(0, dtype=torch.float64))
            else:
                torch.maximum(total, inputs.abs().mean(0, dtype=torch.float64), out=total)

    def finish(self, where: str) -> InputStatistics:
        """The statistics of all batches.

        Raises:
            CalibrationError: no tokens were seen, or a value is not finite; ``where`` names the layer.
        """
        if self.num_tokens == 0:
            raise CalibrationError(f"{where}: no calibration tokens reached this layer")
        values: dict[str, Tensor] = {}
        for statistic, total in self._sums.items():
            value = total if statistic is Statistic.MEAN_ABS else total / self.num_tokens
            if not bool(value.isfinite().all()):
                raise CalibrationError(
                    f"{where}: statistic {statistic.value} is not finite: the layer's inputs overflow. "
                    "Check the checkpoint for NaN or infinite weights"
                )
            values[statistic.value] = value
        return InputStatistics(num_tokens=self.num_tokens, **values)
