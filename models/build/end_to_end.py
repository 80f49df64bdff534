"""The end-to-end phase of a build: all scales of the finished layers learn from the dense network's logits."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..artifact.record import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..calibration.data import CalibrationTokens
from ..config import BuildConfig
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer, RMSNorm
from ..reconstruct.loss import layer_errors
from ..train.end_to_end import ScaleTrainer
from ..train.linear import ActivationClip, TrainableLinear
from ..train.weight import ScaledWeight
from ..transform.inputs import InputTransform
from ..types import InputStatistics, LinearWeights
from .observer import BuildObserver
from .recipe import training_method
from .stream import CalibrationStreams, HiddenStream
from .training import product_dtype, trainable_layer, training_batches
from .vocabulary import quantized_embedding
from .weights import LayerWeights, linear_module, write_layer


def trains_end_to_end(config: BuildConfig) -> bool:
    """Whether ``config`` asks for the phase."""
    return training_method(config) is not None and config.training.end_to_end_epochs > 0


def train_end_to_end(
    checkpoint: Checkpoint,
    config: BuildConfig,
    writer: ArtifactWriter,
    tokens: CalibrationTokens,
    *,
    streams: CalibrationStreams,
    device: torch.device,
    observer: BuildObserver,
) -> CalibrationStreams:
    """Train the scales of a network whose decoder layers are all finished, and rewrite the layers with them.

    What was learnt is on disk before the first layer is rewritten, so that a build which is interrupted in between goes
    on to the same artifact.

    Args:
        checkpoint: the dense network, rewritten.
        config: of the build.
        writer: of the artifact.
        tokens: the calibration set.
        streams: at the network's end.
        device: where to compute.
        observer: is told of the progress.

    Returns:
        ``streams`` with the holdout that goes through quantized layers taken through the new ones.

    Raises:
        CalibrationError: the loss is not finite.
    """
    phase = _Phase(checkpoint, config, writer, tokens, device)
    scales = writer.read_scales()
    if scales is None:
        assert streams.target is not None  # noqa: S101 - a method that trains has one
        scales = phase.train(streams.target, observer)
        writer.write_scales(scales)
    phase.apply(scales)
    return phase.with_new_holdout(streams)


class _Phase:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: BuildConfig,
        writer: ArtifactWriter,
        tokens: CalibrationTokens,
        device: torch.device,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._writer = writer
        self._tokens = tokens
        self._network = checkpoint.config.with_attention(config.attention)
        self._device = device
        self._dense = DenseWeights(checkpoint, torch.float32, device)
        self._layers = [writer.read_layer(index) for index in range(self._network.num_hidden_layers)]

    def train(self, targets: HiddenStream, observer: BuildObserver) -> dict[str, Tensor]:
        """Scales by module path; ``targets`` is the calibration set at the dense network's end."""
        linears = {path: self._trainable(it) for layer in self._layers for path, it in layer.items()}
        blocks = [
            trainable_layer(self._network, index, LayerWeights(self._dense, linears))
            for index in range(self._network.num_hidden_layers)
        ]
        start = self._start(replace(self._tokens, holdout=self._tokens.holdout[:0])).statistics
        batches = training_batches(blocks, start, targets, self._config.calibration.batch_size)
        norm = RMSNorm(self._dense.tensor("model.norm.weight"), self._network.rms_norm_eps)
        head = self._checkpoint.tensor(self._network.head_name, narrow=True).to(self._device)
        observer.phase("training scales", self._config.training.end_to_end_epochs * len(batches))
        trainer = ScaleTrainer(linears, norm, head, self._config.training, precision=product_dtype(self._config))
        generator = torch.Generator().manual_seed(self._config.calibration.seed)
        result = trainer.train(batches, generator, lambda done, _total: observer.progress(done))
        observer.progress(result.num_steps, f"divergence {result.loss_before:.4f} to {result.loss_after:.4f}")
        return {path: linear.merged().quantized.scale.cpu() for path, linear in linears.items()}

    def _start(self, tokens: CalibrationTokens) -> CalibrationStreams:
        """``tokens`` before the first layer."""
        embedding = quantized_embedding(self._checkpoint, self._config, self._device)
        return CalibrationStreams.start(
            self._checkpoint, tokens, self._config.calibration, self._device, quantized=embedding
        )

    def _trainable(self, weights: LinearWeights) -> TrainableLinear:
        """``weights`` with nothing to train but their scales."""
        quantized = weights.quantized
        clip = None if weights.activations is None else ActivationClip(weights.activations, is_trained=False)
        ones = torch.ones(quantized.in_features)
        scaled = ScaledWeight(quantized, use_scales=True)
        linear = TrainableLinear(scaled, weights, clip, ones, precision=product_dtype(self._config))
        return linear.to(self._device)

    def apply(self, scales: Mapping[str, Tensor]) -> None:
        """Rewrite every layer with its new scales; its output errors are not known any more."""
        for index in range(len(self._layers)):
            self._apply(index, scales)

    def _apply(self, index: int, scales: Mapping[str, Tensor]) -> None:
        linears, records = {}, {}
        for path, weights in self._layers[index].items():
            scale = scales[path]
            linears[path] = replace(weights, quantized=replace(weights.quantized, scale=scale))
            dense = InputTransform(weights.input_scale, weights.channel_order, weights.rotation_block)
            wanted = dense.weight(self._checkpoint.tensor(f"{path}.weight").float())
            errors = layer_errors(wanted, linears[path], InputStatistics(0))
            records[path] = LinearRecord.of(linears[path], errors.weight_after)
        self._layers[index] = linears
        write_layer(self._writer, self._checkpoint, index, linears, records)

    def with_new_holdout(self, streams: CalibrationStreams) -> CalibrationStreams:
        """``streams`` with the holdout through the layers as they are now."""
        start = self._start(replace(self._tokens, statistics=self._tokens.statistics[:0]))
        holdout, between = start.holdout_quantized, start.holdout_dense_embedding
        for index, weights in enumerate(self._layers):
            modules = {path: linear_module(path, it, self._device) for path, it in weights.items()}
            layer = DecoderLayer(self._network, index, LayerWeights(self._dense, modules))
            for stream in (holdout, between):
                if stream is not None:
                    stream.advance(layer)
        return replace(streams, holdout_quantized=holdout, holdout_dense_embedding=between)
