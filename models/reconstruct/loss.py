"""How far a quantized and corrected layer is from the dense one: the figures of the build report."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from ..quant.grid import dense_factors, dequantize
from ..quant.weighting import weigh
from ..transform.inputs import InputTransform
from ..types import Correction, InputStatistics, LinearWeights

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Relative errors of one layer, before (codes alone) and after the correction.

    weight_*: ``||E|| / ||W||``
    output_*: ``sqrt(tr(E R E^T) / tr(W R W^T))``, the root mean square error of the outputs relative to the outputs;
        None when no statistic of the inputs is at hand
    """

    weight_before: float
    weight_after: float
    output_before: float | None
    output_after: float | None


def layer_errors(weight: Tensor, weights: LinearWeights, statistics: InputStatistics) -> LayerErrors:
    """Errors of ``weights`` against ``weight`` (out_features, in_features), which it was made of.

    All three are in the layer's own coordinates: the input is divided, gathered and rotated already.
    The output error takes the autocorrelation of the inputs, or else their mean squares (channels as uncorrelated).
    Some rows at a time: the differences in float64 would be the most that a build holds.
    """
    weighting = statistics.mean_square if statistics.autocorrelation is None else statistics.autocorrelation
    weightings = [None] if weighting is None else [None, weighting.double()]
    sums = [[0.0, 0.0, 0.0] for _ in weightings]
    for matrices in _blocks(weight, weights):
        for norm, total in zip(weightings, sums, strict=True):
            for index, rows in enumerate(matrices):
                total[index] += float((weigh(rows, norm) * rows).sum())
    found = [_relative(*total) for total in sums]
    return LayerErrors(*found[0], *(found[1] if len(found) > 1 else (None, None)))


def _blocks(weight: Tensor, weights: LinearWeights) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows at a time, float64: the weight, and what it differs by without and with the correction."""
    factors = None if weights.correction is None else dense_factors(weights.correction)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        dense, quantized = weight[rows].double(), weights.quantized.rows(rows)
        before = dense - stored_weight(LinearWeights(quantized))
        if factors is None:
            yield dense, before, before
        else:
            correction = Correction(factors[0][rows], factors[1])
            yield dense, before, dense - stored_weight(LinearWeights(quantized, correction))


def _relative(reference: float, *losses: float) -> tuple[float, ...]:
    """0 for no error at all, infinite for an error of a weight that gives no output."""
    reference = max(0.0, reference)
    return tuple(sqrt(max(0.0, it) / reference) if reference > 0 else (inf if it > 0 else 0.0) for it in losses)


def weighted_square(rows: Tensor, weighting: Tensor | None) -> float:
    """``tr(A R A^T)`` of ``rows`` (n, in_features) in float64, a block of rows at a time."""
    weighting = None if weighting is None else weighting.double()
    blocks = (block.double() for block in torch.split(rows, _ROWS_AT_ONCE))
    return max(0.0, sum(float((weigh(block, weighting) * block).sum()) for block in blocks))


def stored_weight(weights: LinearWeights) -> Tensor:
    """Codes and correction as one matrix (out_features, in_features) float64, in the layer's own coordinates."""
    weight = dequantize(weights.quantized).double()
    if weights.correction is not None:
        lora_up, lora_down = dense_factors(weights.correction)
        if lora_down is None:
            weight[:, : lora_up.shape[1]] += lora_up.double()
        else:
            weight += lora_up.double() @ lora_down.double()
    return weight


def effective_weight(weights: LinearWeights) -> Tensor:
    """The one matrix (out_features, in_features) float64 that the layer applies to its input."""
    transform = InputTransform(weights.input_scale, weights.channel_order, weights.rotation_block)
    return transform.undo(stored_weight(weights))
