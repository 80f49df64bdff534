"""How far a quantized and corrected layer is from the dense one: the figures of the build report."""

from dataclasses import dataclass, replace
from math import inf, sqrt

import torch
from torch import Tensor

from ..quant.grid import dense_factors, dequantize
from ..quant.weighting import weigh
from ..transform.inputs import InputTransform
from ..types import InputStatistics, LinearWeights

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
    """
    before = weight.double() - stored_weight(replace(weights, correction=None))
    after = before if weights.correction is None else weight.double() - stored_weight(weights)
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
