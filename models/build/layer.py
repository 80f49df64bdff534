"""One decoder layer of a build: statistics, linear layer after linear layer, write."""

from collections.abc import Iterator, Mapping
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
from ..kernels import get_backends
from ..layers.linear import DenseLinear, LowRankLinear
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer
from ..types import InputStatistics, LinearWeights
from .gradients import with_gradients
from .linear import LinearBuilder
from .recipe import LayerRecipe, collected_statistics, input_transforms
from .stream import CalibrationStreams


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


class LayerWeights:
    """A decoder layer's parameters: the modules of its linear layers as they are, norms from the checkpoint."""

    def __init__(self, dense: DenseWeights, linears: Mapping[str, nn.Module]) -> None:
        self._dense = dense
        self._linears = linears

    def tensor(self, name: str) -> Tensor:
        """A norm's gain."""
        return self._dense.tensor(name)

    def linear(self, path: str) -> nn.Module:
        """The layer at module ``path``."""
        return self._linears[path]


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
        self._requires = collected_statistics(config)

    def step(self, index: int, streams: CalibrationStreams, *, is_finished: bool) -> None:
        """Take decoder layer ``index`` from the checkpoint to the disk, and ``streams`` through it.

        Both forms of the layer are released on return: the next one starts from nothing.
        """
        dense = DecoderLayer(self._network, index, self._dense)
        if is_finished:
            modules = {path: self._module(path, it) for path, it in self._writer.read_layer(index).items()}
            quantized = self._layer(index, modules)
        else:
            quantized = self._build(index, dense, streams)
        streams.advance(dense, quantized)

    def _build(self, index: int, dense: DecoderLayer, streams: CalibrationStreams) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        modules: dict[str, nn.Module] = {
            f"{prefix}.{child}": dense.get_submodule(child) for group in INPUT_OWNERS.values() for child in group
        }
        linears: dict[str, LinearWeights] = {}
        records: dict[str, LinearRecord] = {}
        for statistics in self._statistics(index, dense, modules, streams):
            for owner, children in INPUT_OWNERS.items():
                builder = LinearBuilder(self._config)
                for child in children if children[0] in statistics else ():
                    path = f"{prefix}.{child}"
                    known = self._with_known(path, f"{prefix}.{owner}", statistics[child])
                    linears[path], records[path] = self._build_linear(path, modules[path], known, builder)
                    modules[path] = self._module(path, linears[path])
        ordered = self._network.layer_linear_shapes(index)
        norms = {
            name: stored_tensor(self._dense.checkpoint, name)
            for name in self._network.unquantized_shapes()
            if name.startswith(f"{prefix}.")
        }
        self._writer.write_layer(index, {path: linears[path] for path in ordered}, norms, records)
        return self._layer(index, modules)

    def _statistics(
        self, index: int, dense: DecoderLayer, modules: Mapping[str, nn.Module], streams: CalibrationStreams
    ) -> Iterator[dict[str, InputStatistics]]:
        """Statistics by child path: of all linear layers at once, or owner by owner with those before quantized."""
        prefix = f"model.layers.{index}"
        store = self._known.store
        if store is not None and (stored := store.load(index, self._requires, self._dense.device)) is not None:
            yield stored
            return
        runs = streams.statistics.runs
        if not runs:
            yield {child: InputStatistics(0) for children in INPUT_OWNERS.values() for child in children}
            return
        transforms = input_transforms(self._config, index, self._network)
        measurement = Measurement(self._requires, transforms, self._config.activations)
        target = None if streams.target is None else Target(dense, streams.target.runs)
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
    ) -> tuple[LinearWeights, LinearRecord]:
        assert isinstance(layer, DenseLinear)  # noqa: S101 - DenseWeights makes no other kind
        recipe = LayerRecipe.of(self._config, path, layer.in_features)
        try:
            weights, errors = builder.build(layer.weight.data, statistics, recipe)
        except QerveError as error:
            raise type(error)(f"{path}: {error}") from error
        weights = replace(weights, bias=None if layer.bias is None else layer.bias.data)
        return weights, LinearRecord.of(weights, errors.weight_after, errors.output_after)

    def _module(self, path: str, weights: LinearWeights) -> nn.Module:
        """``weights`` run by the reference backend in float32."""
        device = self._dense.device
        return LowRankLinear.of(weights, get_backends("reference"), device=device, dtype=torch.float32, where=path)

    def _layer(self, index: int, modules: Mapping[str, nn.Module]) -> DecoderLayer:
        return DecoderLayer(self._network, index, LayerWeights(self._dense, modules))


def stored_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """An unquantized tensor as the artifact keeps it: matrices at 16 bits, vectors as they are."""
    is_matrix = len(checkpoint.config.unquantized_shapes()[name]) > 1
    return checkpoint.tensor(name, narrow=is_matrix)
