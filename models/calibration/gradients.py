"""Statistics of the gradients of one linear layer, accumulated sequence by sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..transform.hadamard import rotate
from ..types import Statistic

SINK_TOKENS = 4
"""First tokens of a sequence, which later ones attend to for want of anything better (arXiv 2309.17453)."""

_ROWS_AT_ONCE = 256


def num_skipped(length: int) -> int:
    """First tokens of a sequence of ``length`` that output gradients are not taken from; at most a quarter.

    Attention sinks have inputs and gradients orders of magnitude above all others, and the loss saturates in them: what
    a first or second derivative says about them is not what happens. A handful would outweigh all other tokens.
    """
    return min(SINK_TOKENS, length // 4)


@dataclass(frozen=True, slots=True)
class GradientStatistics:
    """What the loss says about one linear layer; the fields of the same names of ``InputStatistics``.

    fisher_rows:     (out_features,) float64
    fisher_columns:  (in_features,) float64
    output_gradient: (out_features,) float64, over all tokens but the first few of each sequence (``num_skipped``)
    input_energy:    (in_features,) float64, E[|g|^2 x_j^2] / E[|g|^2] over the same tokens: mean squares of the rotated
        input, tokens weighed by what the loss makes of them; comes with ``output_gradient``
    A statistic that was not asked for is None.
    """

    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    output_gradient: Tensor | None = None
    input_energy: Tensor | None = None


class GradientAccumulator:
    """Sums over sequences for one linear layer: squared gradients of its weight and of its outputs."""

    def __init__(
        self, out_features: int, in_features: int, requires: frozenset[Statistic], device: torch.device
    ) -> None:
        self._fisher: Tensor | None = None
        self._output: Tensor | None = None
        self._num_counted = 0
        if Statistic.FISHER in requires:
            # float32 holds a sum of a few squares; float64 would double what is the largest matrix alive here.
            self._fisher = torch.zeros(out_features, in_features, device=device)
        if Statistic.OUTPUT_GRADIENT in requires:
            self._output = torch.zeros(out_features, dtype=torch.float64, device=device)
            self._energy = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, gradient: Tensor, rotation_block: int) -> None:
        """One whole sequence: ``x`` (length, in_features), ``gradient`` (length, out_features)."""
        x = rotate(x, rotation_block) if rotation_block else x
        if self._fisher is not None:
            self._fisher.add_((gradient.T @ x).square_())
        if self._output is not None:
            first = num_skipped(len(x))
            squares = gradient[first:].double().square_()
            self._output.add_(squares.sum(0))
            self._energy.add_(squares.sum(1) @ x[first:].double().square_())
            self._num_counted += len(squares)

    def finish(self, num_sequences: int, where: str) -> GradientStatistics:
        """The statistics of ``num_sequences`` sequences.

        Raises:
            CalibrationError: a value is not finite; ``where`` names the layer.
        """
        rows, columns = self._root_means(num_sequences)
        output, energy = None, None
        if self._output is not None:
            output, total = self._output / self._num_counted, float(self._output.sum())
            energy = self._energy / total if total else torch.zeros_like(self._energy)
        for values in (rows, columns, output, energy):
            if values is not None and not bool(values.isfinite().all()):
                raise CalibrationError(
                    f"{where}: its gradients are not finite; check the checkpoint for NaN or infinite weights"
                )
        return GradientStatistics(rows, columns, output, energy)

    def _root_means(self, num_sequences: int) -> tuple[Tensor | None, Tensor | None]:
        """Means of sqrt(F) over columns and over rows."""
        if self._fisher is None:
            return None, None
        rows, columns = [], torch.zeros(self._fisher.shape[1], dtype=torch.float64, device=self._fisher.device)
        for block in torch.split(self._fisher, _ROWS_AT_ONCE):
            root = (block.double() / num_sequences).sqrt_()
            rows.append(root.mean(1))
            columns += root.sum(0)
        return torch.cat(rows), columns / len(self._fisher)
