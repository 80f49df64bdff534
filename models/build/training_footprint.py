"""Device memory that a build takes while it trains, from the configuration alone.

The terms are those of ``models/train``; what autograd keeps per weight and per token was counted on small layers, and a
test holds the prediction against what a training really allocates.
"""

import torch

from ..calibration.collect import INPUT_OWNERS
from ..config import BuildConfig
from ..llama.config import LlamaConfig
from ..reconstruct.qer import Qer
from ..train.codes import values_at_once
from ..types import MATRIX_STATISTICS
from .footprint import num_tokens_inside
from .recipe import collected_statistics, training_method
from .training import product_dtype

_FLOAT, _DOUBLE = 4, 8
_WORKING = 44
"""Bytes per weight while the weights that are merged at a time are formed: products, shifts, sums."""


def training_memory_bytes(network: LlamaConfig, config: BuildConfig, device: torch.device) -> int | None:
    """What training one step's decoder layers holds on ``device`` at most; None: nothing is trained.

    The dense layers, their quantized form, what autograd keeps, and the activations of one batch. Neither the
    embedding, which is gone by then, nor the calibration set and the statistics, which stay in the host's memory.
    """
    method = training_method(config)
    if method is None:
        return None
    training = config.training
    num_blocks = min(training.num_blocks, network.num_hidden_layers)
    sizes = [shape.out_features * shape.in_features for shape in network.layer_linear_shapes(0).values()]
    num_weights, largest = num_blocks * sum(sizes), max(sizes)
    is_narrow = product_dtype(config) != torch.float32
    # The dense layers are there once more where the calibration set runs through them in another dtype.
    per_weight = _held_per_weight(config, method) + product_dtype(config).itemsize * (2 if is_narrow else 1)
    held = num_weights * per_weight
    kept = _kept_per_weight(method) * (largest if training.use_checkpointing else num_weights)
    working = _WORKING * min(largest, values_at_once(device))
    # On a CPU what rests in the host's memory is beside it.
    statistics = num_blocks * statistics_bytes(network, config) if device.type == "cpu" else 0
    num_blocks_inside = 1 if training.use_checkpointing else num_blocks
    training_peak = kept + working + num_blocks_inside * layer_activations(network, config)
    return held + max(training_peak, pass_activations(network, config)) + statistics


def _held_per_weight(config: BuildConfig, method: Qer) -> int:
    """Bytes of the dense weight, of its copy where it is rotated or aimed elsewhere, and of the quantized one."""
    is_copied = config.transform.rotation != "none" or config.objective == "output"
    dense = _FLOAT * (2 if is_copied else 1)
    match method.options.merge:
        case "requantize":
            return dense + 1 + _FLOAT
        case "none":
            return dense + 1
        case "fixed-point" | "inside-rounding":
            return dense + 3
        case _:
            return dense + 2


def _kept_per_weight(method: Qer) -> int:
    """Bytes that autograd keeps per weight for the way back: levels, and what clamp and penalties need."""
    match method.options.merge:
        case "requantize" | "none":
            return 0
        case "inside-rounding":
            return 3 * _FLOAT
        case _:
            return 4 * _FLOAT


def pass_activations(network: LlamaConfig, config: BuildConfig) -> int:
    """Bytes of the sequences that run through one decoder layer together, without gradients."""
    return _FLOAT * num_tokens_inside(config) * (4 * network.hidden_size + 3 * network.intermediate_size)


def layer_activations(network: LlamaConfig, config: BuildConfig) -> int:
    """Bytes of one batch inside one decoder layer, gradients included."""
    calibration = config.calibration
    num_tokens = min(calibration.batch_size, calibration.num_sequences) * calibration.sequence_length
    hidden = 18 + (3 if config.training.precision == "bfloat16" else 0)
    inside = 4.0 + (5.5 if config.activations is not None else 0.0)
    return round(_FLOAT * num_tokens * (hidden * network.hidden_size + inside * network.intermediate_size))


def input_widths(network: LlamaConfig) -> list[int]:
    """Channels of every input of one decoder layer that statistics are taken of."""
    shapes = network.layer_linear_shapes(0)
    return [shapes[f"model.layers.0.{owner}"].in_features for owner in INPUT_OWNERS]


def statistics_bytes(network: LlamaConfig, config: BuildConfig, *, only_widest: bool = False) -> int:
    """Bytes of what the calibration accumulates about the inputs of one decoder layer that are watched together.

    ``only_widest``: of the widest one alone.
    """
    widths = input_widths(network)
    if only_widest or config.calibration.inputs == "sequential":
        widths = [max(widths)]
    num_matrices = len(MATRIX_STATISTICS & collected_statistics(config)) if config.calibration.source != "none" else 0
    return num_matrices * _DOUBLE * sum(width * width for width in widths)
