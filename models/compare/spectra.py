"""Singular values of quantization errors: how much a correction of each rank could take away (methods' common loss).

A rank-k correction leaves ``sum_{i>k} sigma_i^2`` of the squared error, in the plain norm for the weight and, with the
inputs' autocorrelation R, in the norm of the layer's outputs (QERA, arXiv 2410.06040, theorem 1). The faster the
weighted values fall, the more a small rank is worth.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..artifact.reader import ArtifactReader
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..llama.checkpoint import Checkpoint
from ..quant.weighting import weigh
from ..reconstruct.linalg import weighted_low_rank
from ..reconstruct.loss import effective_weight, weighted_square
from ..report.result import Spectrum
from ..transform.inputs import InputTransform
from ..types import InputStatistics, LinearWeights, Statistic

NUM_VALUES = 128


def middle_layer(num_layers: int) -> int:
    """The decoder layer that stands for all."""
    return num_layers // 2


def error_spectra(
    checkpoint: Checkpoint, artifact: ArtifactReader, store: StatisticsStore | None
) -> dict[str, Spectrum]:
    """Spectra of the linear layers in the middle decoder layer, by module path.

    Empty where the network was rewritten before it was quantized (flattening, permutation, offline rotation): its codes
    are then not those of the checkpoint's weights.

    Raises:
        CheckpointError, ArtifactError: a tensor cannot be read.
    """
    if _is_rewritten(artifact.manifest.build):
        return {}
    index = middle_layer(checkpoint.config.num_hidden_layers)
    statistics: Mapping[str, InputStatistics] = {}
    if store is not None:
        statistics = store.load(index, frozenset({Statistic.AUTOCORRELATION})) or {}
    prefix = f"model.layers.{index}."
    spectra = {}
    for path in checkpoint.config.layer_linear_shapes(index):
        known = statistics.get(path.removeprefix(prefix))
        weight = checkpoint.tensor(f"{path}.weight").double()
        autocorrelation = None if known is None else known.autocorrelation
        spectra[path] = error_spectrum(weight, artifact.linear(path), autocorrelation)
    return spectra


@torch.inference_mode()
def error_spectrum(weight: Tensor, weights: LinearWeights, autocorrelation: Tensor | None) -> Spectrum:
    """Spectrum of the error of ``weights``' codes, correction left aside.

    Args:
        weight: (out_features, in_features), what the layer should apply to its input
        weights: the quantized layer
        autocorrelation: (in_features, in_features) of the inputs as the codes see them; None: plain values only
    """
    transform = InputTransform(weights.input_scale, weights.channel_order, weights.rotation_block)
    error = transform.weight(weight.double() - effective_weight(replace(weights, correction=None)))
    plain, plain_total = _largest(error, None)
    if autocorrelation is None:
        return Spectrum(plain, plain_total)
    return Spectrum(plain, plain_total, *_largest(error, autocorrelation.double()))


def _largest(error: Tensor, weighting: Tensor | None) -> tuple[tuple[float, ...], float]:
    """Largest singular values of ``R^(1/2) E^T``, falling, and the sum of the squares of all."""
    total = weighted_square(error, weighting)
    _lora_up, lora_down = weighted_low_rank(error, weighting, min(NUM_VALUES, *error.shape))
    squares = (weigh(lora_down, weighting) * lora_down).sum(1).clamp(min=0)
    values = sorted((math.sqrt(square) for square in squares.tolist()), reverse=True)
    return tuple(float(f"{value:.6g}") for value in values), total


def _is_rewritten(build: BuildConfig) -> bool:
    transform = build.transform
    return transform.flatten is not None or transform.permute or transform.rotation == "offline"
