"""One decoder layer of a build: statistics, quantize, reconstruct, write."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..artifact.format import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..calibration.collect import collect_statistics
from ..config import BuildConfig
from ..errors import QerveError
from ..kernels import get_backends
from ..layers.linear import DenseLinear, LowRankLinear
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer
from ..quant.rtn import quantize_rtn
from ..reconstruct.base import Reconstructor
from ..reconstruct.loss import layer_errors
from ..types import InputStatistics, LinearWeights, QuantizedWeight, Statistic
from .stream import CalibrationStreams


class BuiltWeights:
    """A decoder layer's quantized linears and dense norms, run by the reference backend in float32."""

    def __init__(self, dense: DenseWeights, linears: Mapping[str, LinearWeights]) -> None:
        self._dense = dense
        self._linears = linears

    def tensor(self, name: str) -> Tensor:
        """A norm's gain, unchanged."""
        return self._dense.tensor(name)

    def linear(self, path: str) -> nn.Module:
        """The quantized layer at module ``path``."""
        weights, backends = self._linears[path], get_backends("reference")
        return LowRankLinear.of(weights, backends, device=self._dense.device, dtype=torch.float32, where=path)


class LayerBuilder:
    """Builds decoder layers one after the other, or takes over those that an interrupted build finished."""

    def __init__(
        self, config: BuildConfig, reconstructor: Reconstructor, dense: DenseWeights, writer: ArtifactWriter
    ) -> None:
        self._config = config
        self._reconstructor = reconstructor
        self._dense = dense
        self._writer = writer
        self._network = dense.checkpoint.config

    def step(self, index: int, streams: CalibrationStreams, *, is_finished: bool) -> None:
        """Take decoder layer ``index`` from the checkpoint to the disk, and ``streams`` through it.

        Both forms of the layer are released on return: the next one starts from nothing.
        """
        layer = DecoderLayer(self._network, index, self._dense)
        linears = self._writer.read_layer(index) if is_finished else self._build(index, layer, streams)
        streams.advance(layer, DecoderLayer(self._network, index, BuiltWeights(self._dense, linears)))

    def _build(self, index: int, layer: DecoderLayer, streams: CalibrationStreams) -> dict[str, LinearWeights]:
        prefix = f"model.layers.{index}"
        statistics = self._statistics(layer, streams, prefix)
        linears, records = {}, {}
        for path in self._network.layer_linear_shapes(index):
            child = path.removeprefix(f"{prefix}.")
            linears[path], records[path] = self._build_linear(path, layer.get_submodule(child), statistics.get(child))
        norms = {
            name: stored_tensor(self._dense.checkpoint, name)
            for name in self._network.unquantized_shapes()
            if name.startswith(f"{prefix}.")
        }
        self._writer.write_layer(index, linears, norms, records)
        return linears

    def _statistics(self, layer: DecoderLayer, streams: CalibrationStreams, prefix: str) -> dict[str, InputStatistics]:
        """Statistics by child path; none without calibration data."""
        if not streams.statistics.hidden:
            return {}
        # The reported output error is measured with the autocorrelation, whatever the method itself asks for.
        requires = self._reconstructor.requires | {Statistic.AUTOCORRELATION}
        return collect_statistics(layer, lambda: streams.statistics.visit(layer), requires, prefix)

    def _build_linear(
        self, path: str, layer: nn.Module, statistics: InputStatistics | None
    ) -> tuple[LinearWeights, LinearRecord]:
        assert isinstance(layer, DenseLinear)  # noqa: S101 - DenseWeights makes no other kind
        statistics = statistics or InputStatistics(num_tokens=0)
        try:
            weights = self._reconstructor.reconstruct(layer.weight.data, statistics, self._quantize)
        except QerveError as error:
            raise type(error)(f"{path}: {error}") from error
        weights = replace(weights, bias=None if layer.bias is None else layer.bias.data)
        errors = layer_errors(layer.weight.data, weights, statistics)
        return weights, LinearRecord.of(weights, errors.weight_after, errors.output_after)

    def _quantize(self, weight: Tensor) -> QuantizedWeight:
        return quantize_rtn(weight, self._config.scheme)


def stored_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """An unquantized tensor as the artifact keeps it: matrices at 16 bits, vectors as they are."""
    is_matrix = len(checkpoint.config.unquantized_shapes()[name]) > 1
    return checkpoint.tensor(name, narrow=is_matrix)
