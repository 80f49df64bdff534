"""Parameters of a decoder layer during a build: linear layers in any form, norms as the checkpoint has them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..artifact.record import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..kernels import get_backends
from ..layers.linear import LowRankLinear
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..types import LinearWeights


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


def stored_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """An unquantized tensor as the artifact keeps it: matrices at 16 bits, vectors as they are."""
    is_matrix = len(checkpoint.config.unquantized_shapes()[name]) > 1
    return checkpoint.tensor(name, narrow=is_matrix)


def linear_module(path: str, weights: LinearWeights, device: torch.device) -> nn.Module:
    """``weights`` run by the reference backend in float32."""
    return LowRankLinear.of(weights, get_backends("reference"), device=device, dtype=torch.float32, where=path)


def write_layer(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    index: int,
    linears: Mapping[str, LinearWeights],
    records: Mapping[str, LinearRecord],
) -> None:
    """Write decoder layer ``index``: linear layers in the network's order, norms from ``checkpoint``."""
    network, prefix = checkpoint.config, f"model.layers.{index}."
    ordered = {path: linears[path] for path in network.layer_linear_shapes(index)}
    norms = {name: stored_tensor(checkpoint, name) for name in network.unquantized_shapes() if name.startswith(prefix)}
    writer.write_layer(index, ordered, norms, records)
