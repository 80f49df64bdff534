"""Decoder layers of a build: statistics, linear layer after linear layer, training, write."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..artifact.record import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..calibration.backward import GradientStatistics
from ..calibration.collect import INPUT_OWNERS, Measurement, Target, collect_statistics
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..errors import QerveError
from ..layers.linear import DenseLinear
from ..llama.checkpoint import DenseWeights
from ..llama.model import DecoderLayer
from ..reconstruct.loss import LayerErrors, layer_errors
from ..reconstruct.qer import Qer
from ..train.initial import BuiltLinear
from ..train.loop import TrainingResult
from ..types import InputStatistics, LinearWeights
from .gradients import with_gradients
from .linear import LinearBuilder
from .recipe import LayerRecipe, collected_statistics, input_transforms, training_method
from .resting import Moved, resting
from .stream import CalibrationStreams, HiddenStream
from .training import BuiltLayer, product_dtype, train_layers
from .weights import LayerWeights, StreamedLinear, linear_module, write_layer


@dataclass(frozen=True, slots=True)
class Foreknowledge:
    """What was found out about the whole network before its layers are built one by one.

    gradients:  by module path of a linear layer; empty unless something needs them
    flattening: (in_features,) what the network was rewritten to have divided an input by, by its owner's module path
    store:      statistics of an earlier build from the same dense inputs, and the place to keep new ones
    """

    gradients: Mapping[str, GradientStatistics] = field(default_factory=dict)
    flattening: Mapping[str, Tensor] = field(default_factory=dict)
    store: StatisticsStore | None = None


class LayerBuilder:
    """Builds decoder layers one after the other, or takes over those that an interrupted build finished."""

    def __init__(
        self, config: BuildConfig, dense: DenseWeights, writer: ArtifactWriter, known: Foreknowledge | None = None
    ) -> None:
        self._config = config
        self._dense = dense
        self._writer = writer
        self._known = known or Foreknowledge()
        self._network = dense.checkpoint.config
        self._served = self._network.with_attention(config.attention)
        self._requires = collected_statistics(config)
        self._trained = training_method(config)

    def step(self, indices: Sequence[int], streams: CalibrationStreams, *, is_finished: bool) -> TrainingResult | None:
        """Take consecutive decoder layers from the checkpoint to the disk, and ``streams`` through them.

        Both forms of the layers are released on return: the next ones start from nothing.

        Returns:
            What training them came to; None without.
        """
        dense = [DecoderLayer(self._network, index, self._dense) for index in indices]
        streamed = [self._streamed(index, layer) for index, layer in zip(indices, dense, strict=True)]
        if is_finished:
            for layer in streamed:
                streams.advance_target(layer)
            quantized, result = [self._layer(index, self._finished(index)) for index in indices], None
        else:
            quantized, result = self._build(indices, dense, streamed, streams)
        for of_dense, of_quantized in zip(streamed, quantized, strict=True):
            streams.advance(of_dense, of_quantized)
        return result

    def _build(
        self,
        indices: Sequence[int],
        dense: Sequence[DecoderLayer],
        streamed: Sequence[DecoderLayer],
        streams: CalibrationStreams,
    ) -> tuple[list[DecoderLayer], TrainingResult | None]:
        """Quantize the layers one after the other, train them together where the method trains, write them."""
        inputs = streams.statistics if len(indices) == 1 else streams.statistics.copy()
        layers = []
        for index, layer, passed in zip(indices, dense, streamed, strict=True):
            built = self._quantized(index, layer, passed, inputs, streams.target)
            streams.advance_target(passed)
            if index != indices[-1]:
                inputs.advance(self._layer(index, self._modules(built)))
            layers.append(built)
        result = None
        if self._trained is not None and streams.target is not None:
            layers, result = self._train(self._trained, layers, streams.statistics, streams.target)
        for built in layers:
            self._write(built)
        return [self._layer(built.index, self._modules(built)) for built in layers], result

    def _quantized(
        self,
        index: int,
        dense: DecoderLayer,
        streamed: DecoderLayer,
        inputs: HiddenStream,
        target: HiddenStream | None,
    ) -> BuiltLayer:
        """``dense`` quantized; ``streamed`` is what the calibration set runs through."""
        modules = _linears(index, streamed)
        is_sequential = self._config.calibration.inputs == "sequential"
        built = BuiltLayer(index)
        for statistics in map(resting, self._statistics(index, streamed, modules, inputs, target)):
            for owner in INPUT_OWNERS:
                if owner not in statistics:
                    continue
                paths = self._quantize_readers(built, owner, dense, statistics)
                if is_sequential:
                    modules |= {path: self._module(path, built.weights[path]) for path in paths}
        return built

    def _quantize_readers(
        self, built: BuiltLayer, owner: str, dense: DecoderLayer, statistics: Mapping[str, InputStatistics]
    ) -> list[str]:
        """Add the layers that read the input of ``owner`` to ``built``; no other statistics are on the device.

        Returns:
            Their module paths.
        """
        prefix = f"model.layers.{built.index}"
        builder, moved = LinearBuilder(self._config), Moved(self._dense.device)
        paths = {child: f"{prefix}.{child}" for child in INPUT_OWNERS[owner]}
        for child, path in paths.items():
            known = self._with_known(path, f"{prefix}.{owner}", moved.to_device(statistics[child]))
            linear, errors = self._build_linear(path, dense.get_submodule(child), known, builder)
            built.weights[path], built.errors[path] = linear.weights, errors
            if self._trained is not None:
                built.sources[path] = replace(linear, statistics=moved.to_host(linear.statistics))
        return list(paths.values())

    def _train(
        self, method: Qer, layers: list[BuiltLayer], inputs: HiddenStream, targets: HiddenStream
    ) -> tuple[list[BuiltLayer], TrainingResult]:
        network, dense = self._served, self._dense
        merged, result = train_layers(self._config, method, layers, inputs, targets, network=network, dense=dense)
        trained = []
        for built, weights in zip(layers, merged, strict=True):
            errors = {
                path: layer_errors(it.weight, weights[path], Moved(dense.device).to_device(it.statistics))
                for path, it in built.sources.items()
            }
            trained.append(BuiltLayer(built.index, weights, errors))
        return trained, result

    def _write(self, built: BuiltLayer) -> None:
        records = {
            path: LinearRecord.of(built.weights[path], errors.weight_after, errors.output_after)
            for path, errors in built.errors.items()
        }
        write_layer(self._writer, self._dense.checkpoint, built.index, built.weights, records)

    def _modules(self, built: BuiltLayer) -> dict[str, nn.Module]:
        return {path: self._module(path, weights) for path, weights in built.weights.items()}

    def _finished(self, index: int) -> dict[str, nn.Module]:
        return {path: self._module(path, weights) for path, weights in self._writer.read_layer(index).items()}

    def _statistics(
        self,
        index: int,
        dense: DecoderLayer,
        modules: Mapping[str, nn.Module],
        inputs: HiddenStream,
        target_stream: HiddenStream | None,
    ) -> Iterator[dict[str, InputStatistics]]:
        """Statistics by child path: of all linear layers at once, or owner by owner with those before quantized."""
        prefix = f"model.layers.{index}"
        store = self._known.store
        if store is not None and (stored := store.load(index, self._requires, self._dense.device)) is not None:
            yield stored
            return
        runs = inputs.runs
        if not runs:
            yield {child: InputStatistics(0) for children in INPUT_OWNERS.values() for child in children}
            return
        transforms = input_transforms(self._config, index, self._network)
        measurement = Measurement(self._requires, transforms, self._config.activations)
        target = None if target_stream is None else Target(dense, target_stream.runs)
        if self._config.calibration.inputs == "sequential":
            for owner in INPUT_OWNERS:
                layer = self._layer(index, modules)
                yield collect_statistics(layer, runs, measurement, prefix, owners=(owner,), target=target)
            return
        statistics = collect_statistics(dense, runs, measurement, prefix, target=target)
        if store is not None:
            store.save(index, statistics)
        yield statistics

    def _with_known(self, path: str, owner: str, statistics: InputStatistics) -> InputStatistics:
        """``statistics`` with what was known before: gradients and flattening."""
        statistics = replace(statistics, flattening=self._known.flattening.get(owner))
        return with_gradients(statistics, self._known.gradients.get(path))

    def _build_linear(
        self, path: str, layer: nn.Module, statistics: InputStatistics, builder: LinearBuilder
    ) -> tuple[BuiltLinear, LayerErrors]:
        assert isinstance(layer, DenseLinear)  # noqa: S101 - DenseWeights makes no other kind
        recipe = LayerRecipe.of(self._config, path, layer.in_features)
        try:
            built, errors = builder.build(layer.weight.data, statistics, recipe)
        except QerveError as error:
            raise type(error)(f"{path}: {error}") from error
        weights = replace(built.weights, bias=None if layer.bias is None else layer.bias.data)
        return replace(built, weights=weights), errors

    def _module(self, path: str, weights: LinearWeights) -> nn.Module:
        """``weights`` as the calibration set runs through them: formed once where it does so often."""
        if self._trained is not None:
            return StreamedLinear.of_quantized(weights, self._dense.device, product_dtype(self._config))
        return linear_module(path, weights, self._dense.device)

    def _streamed(self, index: int, dense: DecoderLayer) -> DecoderLayer:
        """``dense`` as the calibration set runs through it."""
        precision = product_dtype(self._config)
        if self._trained is None or precision == torch.float32:
            return dense
        linears = _linears(index, dense).items()
        modules = {path: StreamedLinear.of_dense(it, precision) for path, it in linears if isinstance(it, DenseLinear)}
        return DecoderLayer(self._network, index, LayerWeights(self._dense, modules))

    def _layer(self, index: int, modules: Mapping[str, nn.Module]) -> DecoderLayer:
        return DecoderLayer(self._served, index, LayerWeights(self._dense, modules))


def _linears(index: int, layer: DecoderLayer) -> dict[str, nn.Module]:
    """The linear layers of decoder layer ``index`` by module path."""
    children = (child for group in INPUT_OWNERS.values() for child in group)
    return {f"model.layers.{index}.{child}": layer.get_submodule(child) for child in children}
