"""Embedding and output head of a build, as far as they are quantized: some rows at a time, and no correction.

8 bits round to nearest. A head of 4 bits goes through GPTQ (arXiv 2210.17323) with the autocorrelation of what the
calibration set leaves the final norm with, each row on the better of two sets of grids. Without calibration, the grid
of each group is the one with the least error when the mean square of a channel is taken for that of the norm's gain:
hidden states have a mean square of one before it.
"""

from math import sqrt

import torch
from torch import Tensor

from ..artifact.record import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..calibration.statistics import LayerInputs, StatisticsAccumulator
from ..config import BuildConfig, QuantizerConfig
from ..errors import QerveError
from ..llama.checkpoint import Checkpoint
from ..llama.model import RMSNorm
from ..quant.grid import dequantize_rows
from ..quant.quantizers import get_quantizer
from ..reconstruct.loss import weighted_square
from ..scheme import EMBEDDING, HEAD
from ..types import InputStatistics, LinearWeights, QuantizedWeight, QuantizeFn, Statistic
from .stream import HiddenStream
from .weights import stored_tensor

_ROWS_AT_ONCE = 4096


def needs_head_statistics(config: BuildConfig) -> bool:
    """Whether the head's codes depend on the calibration set, if there is one."""
    return config.vocabulary.head_bits == 4


def quantized_embedding(checkpoint: Checkpoint, config: BuildConfig, device: torch.device) -> QuantizedWeight | None:
    """The embedding as the artifact will store it, on ``device``; None: it is not quantized."""
    if EMBEDDING not in checkpoint.config.with_vocabulary(config.vocabulary).vocabulary:
        return None
    weight = checkpoint.tensor(f"{EMBEDDING}.weight")
    return quantize_by_rows(weight, _round_to_nearest(config, EMBEDDING, weight.shape[1]), device)


def write_rest(
    writer: ArtifactWriter, checkpoint: Checkpoint, config: BuildConfig, inputs: HiddenStream, device: torch.device
) -> None:
    """Write what belongs to no decoder layer, unless an interrupted build has.

    Args:
        writer: of the artifact.
        checkpoint: the dense network, rewritten.
        config: of the build.
        inputs: the calibration set behind the last decoder layer.
        device: where to compute.

    Raises:
        SchemeError: a weight that its format cannot hold.
        CalibrationError: the hidden states are not finite.
    """
    if writer.has_rest():
        return
    network = checkpoint.config.with_vocabulary(config.vocabulary)
    linears, records = {}, {}
    for path in network.vocabulary:
        weight = checkpoint.tensor(network.head_name if path == HEAD else f"{EMBEDDING}.weight")
        statistics = _head_statistics(checkpoint, config, inputs, device) if path == HEAD else None
        quantize = _quantize_fn(checkpoint, config, path, statistics)
        try:
            linears[path] = LinearWeights(quantize_by_rows(weight, quantize, device))
        except QerveError as error:
            raise type(error)(f"{path}: {error}") from error
        errors = relative_errors(weight, linears[path].quantized, statistics)
        records[path] = LinearRecord.of(linears[path], *errors)
    names = [name for name in network.unquantized_shapes() if not name.startswith("model.layers.")]
    writer.write_rest({name: stored_tensor(checkpoint, name) for name in names}, linears, records)


def quantize_by_rows(weight: Tensor, quantize: QuantizeFn, device: torch.device) -> QuantizedWeight:
    """``quantize`` some rows of ``weight`` (vocab_size, hidden_size) at a time: a float32 copy would be the largest
    tensor of a build. Rows do not depend on each other. The result is on ``device``, symmetric.
    """
    parts = [quantize(rows.to(device, torch.float32)) for rows in torch.split(weight, _ROWS_AT_ONCE)]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    return QuantizedWeight(codes, scale, None, parts[0].scheme)


def relative_errors(
    weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics | None
) -> tuple[float, float | None]:
    """Relative error of the weight, and with statistics of its outputs: as ``reconstruct.loss`` defines them."""
    weightings = [None] if statistics is None else [None, statistics.autocorrelation]
    losses, references = [0.0] * len(weightings), [0.0] * len(weightings)
    for indices in torch.split(torch.arange(len(weight)), _ROWS_AT_ONCE):
        rows = weight[indices[0] : indices[-1] + 1].to(quantized.codes.device, torch.float64)
        error = rows - dequantize_rows(quantized, indices.to(rows.device))
        for index, weighting in enumerate(weightings):
            losses[index] += weighted_square(error, weighting)
            references[index] += weighted_square(rows, weighting)
    found = [
        sqrt(loss / reference) if reference > 0 else 0.0 for loss, reference in zip(losses, references, strict=True)
    ]
    return found[0], found[1] if len(found) > 1 else None


def _round_to_nearest(config: BuildConfig, path: str, hidden_size: int) -> QuantizeFn:
    return get_quantizer(QuantizerConfig(), config.vocabulary.scheme(path, hidden_size)).bind(InputStatistics(0))


def _quantize_fn(
    checkpoint: Checkpoint, config: BuildConfig, path: str, statistics: InputStatistics | None
) -> QuantizeFn:
    hidden_size = checkpoint.config.hidden_size
    scheme = config.vocabulary.scheme(path, hidden_size)
    if scheme.num_bits == 8:
        return _round_to_nearest(config, path, hidden_size)
    if statistics is not None:
        return get_quantizer(QuantizerConfig("gptq", use_clip_search=True), scheme).bind(statistics)
    gain = checkpoint.tensor("model.norm.weight").double()
    expected = InputStatistics(0, mean_square=gain.square())
    return get_quantizer(QuantizerConfig(use_clip_search=True), scheme).bind(expected)


def _head_statistics(
    checkpoint: Checkpoint, config: BuildConfig, inputs: HiddenStream, device: torch.device
) -> InputStatistics | None:
    """Autocorrelation of the head's inputs; None where it is not needed, or nothing was calibrated."""
    if not needs_head_statistics(config) or not inputs.hidden:
        return None
    network = checkpoint.config
    norm = RMSNorm(checkpoint.tensor("model.norm.weight").to(device, torch.float32), network.rms_norm_eps)
    requires = frozenset({Statistic.AUTOCORRELATION})
    accumulator = StatisticsAccumulator(network.hidden_size, requires, device)
    with torch.inference_mode():
        for hidden in inputs.hidden:
            states = norm(hidden.to(device))
            accumulator.update(LayerInputs(states, states, states))
        return accumulator.finish(HEAD)
