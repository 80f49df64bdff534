"""Statistics of a linear layer's inputs, accumulated batch by batch.

Sums are kept in float64: a float32 sum over a million tokens loses the small eigenvalues of the autocorrelation, on
which QERA-exact depends. Each batch's own product is a float32 GEMM (QERA, arXiv 2410.06040, appendix A.7).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..types import MATRIX_STATISTICS, InputStatistics, Statistic

_LARGEST = frozenset({Statistic.MEAN_ABS, Statistic.ABSMAX})


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """One batch of a linear layer's inputs, each (num_tokens, num_features); see ``InputStatistics``.

    x: before the quantization of activations; quantized: after it; target: of the dense network's layer
    """

    x: Tensor
    quantized: Tensor
    target: Tensor

    def measure(self, statistic: Statistic) -> Tensor:
        """The batch's sum, or for the magnitudes its value, float32 or float64."""
        x = self.x.float()
        match statistic:
            case Statistic.AUTOCORRELATION:
                return x.T @ x
            case Statistic.QUANTIZED_AUTOCORRELATION:
                quantized = self.quantized.float()
                return quantized.T @ quantized
            case Statistic.CROSS_CORRELATION:
                return self.quantized.float().T @ self.target.float()
            case Statistic.MEAN_SQUARE:
                return x.square().sum(0, dtype=torch.float64)
            case Statistic.MEAN_ABS:
                return x.abs().mean(0, dtype=torch.float64)
            case Statistic.ABSMAX:
                return x.abs().amax(0)
            case _:
                raise ValueError(f"{statistic.value} is not a statistic of inputs")


class StatisticsAccumulator:
    """Accumulates what ``requires`` names, and nothing more, for inputs of ``num_features`` channels."""

    def __init__(self, num_features: int, requires: frozenset[Statistic], device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self._totals: dict[Statistic, Tensor] = {}
        for statistic in sorted(requires):
            shape = (num_features, num_features) if statistic in MATRIX_STATISTICS else (num_features,)
            self._totals[statistic] = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add one calibration batch."""
        self.num_tokens += inputs.x.shape[0]
        for statistic, total in self._totals.items():
            value = inputs.measure(statistic)
            if statistic in _LARGEST:
                torch.maximum(total, value.double(), out=total)
            else:
                total.add_(value)

    def finish(self, where: str) -> InputStatistics:
        """The statistics of all batches.

        Raises:
            CalibrationError: no tokens were seen, or a value is not finite; ``where`` names the layer.
        """
        if self.num_tokens == 0:
            raise CalibrationError(f"{where}: no calibration tokens reached this layer")
        values: dict[str, Tensor] = {}
        for statistic, total in self._totals.items():
            value = total if statistic in _LARGEST else total.div_(self.num_tokens)
            if not bool(torch.stack(torch.aminmax(value)).isfinite().all()):
                raise CalibrationError(
                    f"{where}: statistic {statistic.value} is not finite: the layer's inputs overflow. "
                    "Check the checkpoint for NaN or infinite weights"
                )
            values[statistic.value] = value
        return InputStatistics(num_tokens=self.num_tokens, **values)
