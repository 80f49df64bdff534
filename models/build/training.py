"""Training within the build: decoder layers that the base quantizer made learn to put out what the dense ones do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..calibration.collect import INPUT_OWNERS
from ..config import BuildConfig
from ..llama.checkpoint import DenseWeights
from ..llama.config import LlamaConfig
from ..llama.model import DecoderLayer
from ..reconstruct.loss import LayerErrors
from ..reconstruct.qer import Qer
from ..train.blocks import BlockTrainer
from ..train.initial import BuiltLinear, trainable_linear
from ..train.linear import ActivationClip, TrainableLinear
from ..train.loop import TrainingBatch, TrainingResult
from ..types import LinearWeights
from .recipe import LayerRecipe, training_method
from .stream import HiddenStream
from .weights import LayerWeights


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """One decoder layer in its quantized form; all by module path.

    weights: what ships
    errors:  against the dense layer
    sources: what the linear layers were made from; empty unless they are to be trained
    """

    index: int
    weights: dict[str, LinearWeights] = field(default_factory=dict)
    errors: dict[str, LayerErrors] = field(default_factory=dict)
    sources: dict[str, BuiltLinear] = field(default_factory=dict)


def num_blocks_together(config: BuildConfig) -> int:
    """Decoder layers that are built in one step."""
    return 1 if training_method(config) is None else config.training.num_blocks


def train_layers(
    config: BuildConfig,
    method: Qer,
    layers: Sequence[BuiltLayer],
    inputs: HiddenStream,
    targets: HiddenStream,
    *,
    network: LlamaConfig,
    dense: DenseWeights,
) -> tuple[list[dict[str, LinearWeights]], TrainingResult]:
    """Train consecutive decoder layers together; the same arguments give the same result.

    Args:
        config: of the build.
        method: that trains.
        layers: what is trained, in order.
        inputs: the calibration set before the first of them, from the quantized layers before.
        targets: the calibration set after the last of them, from dense layers.
        network: as it is served.
        dense: where norms come from.

    Returns:
        The merged linear layers of each decoder layer by module path, and the errors of the block before and after.

    Raises:
        CalibrationError: a statistic is missing, or a loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.calibration.seed * 1_000_003 + layers[0].index)
    precision = product_dtype(config)
    modules: list[dict[str, TrainableLinear]] = []
    for layer in layers:
        clips = _clips(config, method, layer)
        modules.append({
            path: trainable_linear(
                _own_method(config, path, built),
                built,
                clips.get(path),
                generator=generator,
                precision=precision,
                use_checkpointing=config.training.use_checkpointing,
            )
            for path, built in layer.sources.items()
        })  # fmt: skip
    blocks = [
        trainable_layer(network, layer.index, LayerWeights(dense, linears))
        for layer, linears in zip(layers, modules, strict=True)
    ]
    linears = {path: linear for of_layer in modules for path, linear in of_layer.items()}
    where = f"model.layers.{layers[0].index}" + (f" to {layers[-1].index}" if len(layers) > 1 else "")
    trainer = BlockTrainer(linears, method, config.training, where)
    result = trainer.train(training_batches(blocks, inputs, targets, config.calibration.batch_size), generator)
    return [{path: linear.merged() for path, linear in of_layer.items()} for of_layer in modules], result


def product_dtype(config: BuildConfig) -> torch.dtype:
    """Of products with activations, in training and in the passes between layers of a build that trains."""
    return torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32


def trainable_layer(network: LlamaConfig, index: int, weights: LayerWeights) -> DecoderLayer:
    """Decoder layer ``index`` of ``network``, with gradients through quantized queries, keys and values too."""
    layer = DecoderLayer(network, index, weights)
    if network.attention is not None:
        layer.self_attn.quantize = ActivationClip(network.attention, is_trained=False)
    return layer


def _own_method(config: BuildConfig, path: str, built: BuiltLinear) -> Qer:
    """The method with the rank that the linear layer ``path`` has of its own."""
    reconstructor = LayerRecipe.of(config, path, built.weight.shape[1]).reconstructor
    assert isinstance(reconstructor, Qer)  # noqa: S101 - exceptions change the rank, not the method
    return reconstructor


def _clips(config: BuildConfig, method: Qer, layer: BuiltLayer) -> dict[str, ActivationClip]:
    """One per quantized input, for every linear layer that reads it."""
    if config.activations is None:
        return {}
    device = next(iter(layer.sources.values())).weight.device
    clips: dict[str, ActivationClip] = {}
    for children in INPUT_OWNERS.values():
        clip = ActivationClip(config.activations, is_trained=method.options.use_clips, num_readers=len(children)).to(
            device
        )
        clips |= {f"model.layers.{layer.index}.{child}": clip for child in children}
    return clips


def training_batches(
    blocks: Sequence[nn.Module], inputs: HiddenStream, targets: HiddenStream, batch_size: int
) -> list[TrainingBatch]:
    """One per ``batch_size`` sequences: ``inputs`` before ``blocks``, ``targets`` after the dense ones."""
    inputs, targets = inputs.split(batch_size), targets.split(batch_size)
    steps = zip(inputs.hidden, targets.hidden, inputs.passes, strict=True)
    return [TrainingBatch(hidden, target, [partial(run, it) for it in blocks]) for hidden, target, run in steps]
