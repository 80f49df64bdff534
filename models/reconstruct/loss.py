"""How far a quantized and corrected layer is from the dense one: the figures of the build report."""

from dataclasses import dataclass, replace
from math import inf, sqrt

import torch
from torch import Tensor

from ..quant.affine import dequantize
from ..types import InputStatistics, LinearWeights
from .linalg import weigh

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
    """Errors of ``weights`` against the dense ``weight`` (out_features, in_features).

    The output error takes the autocorrelation of the inputs, or else their mean squares (channels as uncorrelated).
    """
    before = weight.double() - effective_weight(replace(weights, correction=None))
    after = before if weights.correction is None else weight.double() - effective_weight(weights)
    weight_before, weight_after = _relative_errors(weight, None, before, after)
    weighting = statistics.mean_square if statistics.autocorrelation is None else statistics.autocorrelation
    if weighting is None:
        return LayerErrors(weight_before, weight_after, None, None)
    return LayerErrors(weight_before, weight_after, *_relative_errors(weight, weighting, before, after))


def _relative_errors(weight: Tensor, weighting: Tensor | None, *errors: Tensor) -> tuple[float, ...]:
    """0 for no error at all, infinite for an error of a weight that gives no output."""
    reference = weighted_square(weight, weighting)
    losses = (weighted_square(error, weighting) for error in errors)
    return tuple(sqrt(loss / reference) if reference > 0 else (inf if loss > 0 else 0.0) for loss in losses)


def weighted_square(rows: Tensor, weighting: Tensor | None) -> float:
    """``tr(A R A^T)`` of ``rows`` (n, in_features) in float64, a block of rows at a time."""
    weighting = None if weighting is None else weighting.double()
    blocks = (block.double() for block in torch.split(rows, _ROWS_AT_ONCE))
    return max(0.0, sum(float((weigh(block, weighting) * block).sum()) for block in blocks))


def effective_weight(weights: LinearWeights) -> Tensor:
    """The one matrix (out_features, in_features) float64 that the layer applies to its input."""
    weight = dequantize(weights.quantized).double()
    correction = weights.correction
    if correction is not None:
        lora_up = correction.lora_up.double()
        if correction.lora_down is None:
            weight[:, : correction.rank] += lora_up
        else:
            weight += lora_up @ correction.lora_down.double()
    if weights.channel_order is not None:
        weight = torch.empty_like(weight).index_copy_(1, weights.channel_order.long(), weight)
    return weight if weights.input_scale is None else weight / weights.input_scale.double()
