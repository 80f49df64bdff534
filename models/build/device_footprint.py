"""What a build holds on its device at most, phase by phase, from the configuration alone: ``qerve plan`` prints it.

Held throughout: one step's decoder layers in float32. Hidden states of the calibration set stay in the host's memory
but for the batch inside a layer, statistics but for those of one input; embedding and head come for a moment at either
end, in 16 bits. The factors below were counted on small layers, and a test holds the prediction against what builds
really allocate. What libraries take for themselves (a CUDA context and the workspaces of its libraries, several hundred
MiB) comes on top.
"""

import math
from enum import StrEnum

import torch

from ..calibration.generate import writing_bytes
from ..config import BuildConfig
from ..llama.config import LlamaConfig
from ..reconstruct.serq import Serq
from ..types import Statistic
from .footprint import num_tokens_inside
from .recipe import has_target_stream, required_statistics, training_method
from .training import num_blocks_together, product_dtype
from .training_footprint import (
    input_widths,
    layer_activations,
    pass_activations,
    statistics_bytes,
    training_memory_bytes,
)

_FLOAT, _DOUBLE = 4, 8
_ROUNDING = {"rtn": 14, "gptq": 22}
"""Bytes per weight of one linear layer while its codes are chosen."""
_FACTORIZED = 12
"""Bytes per entry of the autocorrelation while GPTQ factorizes it, and while it is used."""
_FACTOR = 4
_SOLVED = 28
"""Bytes per weight while the correction of one linear layer is found."""
_ERRORS = 50
"""Bytes per weight, of those whose errors are measured at a time."""
_ROWS_MEASURED = 1024
_SHRUNK = 4
"""Matrices as large as the autocorrelation while it is shrunk."""
_VOCABULARY_ROWS = 4096


class DevicePhase(StrEnum):
    """The parts of a build that hold different things."""

    TEXT = "writing calibration text"
    GRADIENTS = "taking gradients"
    STATISTICS = "collecting statistics"
    QUANTIZING = "quantizing"
    TRAINING = "training"
    SCALES = "training scales end to end"
    VOCABULARY = "embedding and head"


def device_memory(network: LlamaConfig, config: BuildConfig, device: torch.device) -> dict[DevicePhase, int]:
    """Bytes of tensors on ``device`` at most, by phase; phases that ``config`` does not have are left out."""
    calibration = config.calibration
    phases = {DevicePhase.VOCABULARY: _vocabulary(network)}
    if calibration.source == "self":
        phases[DevicePhase.TEXT] = _text(network, config)
    if any(statistic.needs_gradients for statistic in required_statistics(config)):
        phases[DevicePhase.GRADIENTS] = _gradients(network, config)
    if calibration.source != "none":
        phases[DevicePhase.STATISTICS] = _collecting(network, config)
    phases[DevicePhase.QUANTIZING] = _quantizing(network, config, device)
    training = training_memory_bytes(network, config, device)
    if training is not None:
        phases[DevicePhase.TRAINING] = training
        if config.training.end_to_end_epochs:
            phases[DevicePhase.SCALES] = _end_to_end(network, config)
    return phases


def _num_weights(network: LlamaConfig) -> int:
    return sum(shape.out_features * shape.in_features for shape in network.layer_linear_shapes(0).values())


def _held_per_weight(config: BuildConfig) -> int:
    """Bytes of the dense layers while they are built: float32, and as the calibration set runs through them."""
    narrow = product_dtype(config)
    is_copied = training_method(config) is not None and narrow != torch.float32
    return _FLOAT + (narrow.itemsize if is_copied else 0)


def _num_blocks(network: LlamaConfig, config: BuildConfig) -> int:
    return min(num_blocks_together(config), network.num_hidden_layers)


def _vocabulary(network: LlamaConfig) -> int:
    """Embedding or head, and the rows of it that are widened or quantized at a time."""
    return 2 * network.vocab_size * network.hidden_size + 8 * _VOCABULARY_ROWS * network.hidden_size


def _text(network: LlamaConfig, config: BuildConfig) -> int:
    calibration = config.calibration
    num_sequences = calibration.num_sequences + calibration.num_holdout
    return writing_bytes(network, num_sequences, calibration.sequence_length, torch.bfloat16)


def _gradients(network: LlamaConfig, config: BuildConfig) -> int:
    """A dense layer and its squared gradients; hidden states between segments and inside one; one sequence inside."""
    calibration = config.calibration
    num_sequences = min(calibration.num_gradient_sequences, calibration.num_sequences)
    states = _FLOAT * calibration.sequence_length * network.hidden_size
    num_states = num_sequences * (2 * (math.isqrt(network.num_hidden_layers - 1) + 1) + 2)
    num_squares = 2 if Statistic.FISHER in required_statistics(config) else 1
    inside = _FLOAT * calibration.sequence_length * (18 * network.hidden_size + 4 * network.intermediate_size)
    return _FLOAT * num_squares * _num_weights(network) + num_states * states + inside + _vocabulary(network)


def _collecting(network: LlamaConfig, config: BuildConfig) -> int:
    """The dense layers, statistics of every input that is watched, a batch's product, the batch inside."""
    widest = max(input_widths(network))
    product = _FLOAT * widest * widest
    held = _held_per_weight(config) * _num_blocks(network, config) * _num_weights(network)
    inputs = 0
    if has_target_stream(config):
        inputs = _FLOAT * num_tokens_inside(config) * sum(input_widths(network))
    return held + statistics_bytes(network, config) + product + pass_activations(network, config) + inputs


def _quantizing(network: LlamaConfig, config: BuildConfig, device: torch.device) -> int:
    """The dense layers and their codes, statistics of one input, and what one linear layer takes."""
    num_blocks = _num_blocks(network, config)
    is_copied = training_method(config) is not None and (
        config.transform.rotation != "none" or config.objective == "output"
    )
    per_weight = _held_per_weight(config) + 1 + (_FLOAT if is_copied else 0)
    working = max(_working(config, rows, columns) for rows, columns in _shapes(network))
    # On a CPU what rests in the host's memory is beside it.
    resting = num_blocks * statistics_bytes(network, config) if device.type == "cpu" else 0
    one_input = 0 if device.type == "cpu" else statistics_bytes(network, config, only_widest=True)
    return num_blocks * per_weight * _num_weights(network) + max(resting, one_input) + working


def _shapes(network: LlamaConfig) -> list[tuple[int, int]]:
    return [(shape.out_features, shape.in_features) for shape in network.layer_linear_shapes(0).values()]


def _working(config: BuildConfig, num_rows: int, num_columns: int) -> int:
    """What one linear layer takes beside its weight, codes and statistics."""
    size, square = num_rows * num_columns, num_columns * num_columns
    is_gptq = config.quantizer.method == "gptq"
    factor = _FACTOR * square if is_gptq else 0
    at_once = [factor + _ROUNDING[config.quantizer.method] * size]
    if is_gptq:
        at_once.append(_FACTORIZED * square)
    has_correction = config.reconstruct.method != "none" and training_method(config) is None
    if has_correction:
        at_once.append(factor + _SOLVED * size)
    at_once.append(factor + _ERRORS * min(num_rows, _ROWS_MEASURED) * num_columns)
    shrunk = _SHRUNK * _DOUBLE * square if config.calibration.shrinkage else 0
    rotated = _FLOAT * size if config.transform.rotation != "none" else 0
    return max(*at_once, shrunk) + rotated + _num_own(config) * _DOUBLE * square


def _num_own(config: BuildConfig) -> int:
    """Matrices as large as the autocorrelation that the method makes: gathered in its order, solved for an aim."""
    is_aimed = config.objective == "output" or config.reconstruct.refit
    return (3 if config.reconstruct.method == Serq.method else 0) + (1 if is_aimed else 0)


def _end_to_end(network: LlamaConfig, config: BuildConfig) -> int:
    """Codes of the whole network, and one decoder layer with gradients; hidden states before every layer."""
    calibration, num_layers = config.calibration, network.num_hidden_layers
    num_tokens = min(calibration.batch_size, calibration.num_sequences) * calibration.sequence_length
    hidden = _FLOAT * num_tokens * network.hidden_size * num_layers
    group = config.scheme.group_length(network.hidden_size)
    # A scale with its gradient and two moments, in float32 beside the stored one.
    codes = num_layers * _num_weights(network) * (1 + 18 / group)
    formed = 3 * _FLOAT * _num_weights(network)
    return round(codes) + formed + hidden + layer_activations(network, config) + _vocabulary(network)
