"""Parameters of a decoder layer during a build: linear layers in any form, norms as the checkpoint has them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact.record import LinearRecord
from ..artifact.writer import ArtifactWriter
from ..kernels import get_backends
from ..kernels.dense_terms import DenseTerms
from ..layers.linear import DenseLinear, LowRankLinear
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..reconstruct.loss import stored_weight
from ..transform.inputs import InputTransform
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


class StreamedLinear(nn.Module):
    """A linear layer on its way past a calibration set: one dense matrix, formed once, in the dtype of the products.

    Args:
        weight: (out_features, in_features), of inputs as ``terms`` prepares them, corrections included.
        terms: the rest of the layer, without corrections.
    """

    def __init__(self, weight: Tensor, terms: DenseTerms) -> None:
        super().__init__()
        self._weight = weight
        self._terms = terms

    @classmethod
    def of_dense(cls, layer: DenseLinear, precision: torch.dtype) -> Self:
        """``layer`` with products in ``precision``."""
        return cls(layer.weight.to(precision), DenseTerms(InputTransform(), None, None, None, layer.bias))

    @classmethod
    def of_quantized(cls, weights: LinearWeights, device: torch.device, precision: torch.dtype) -> Self:
        """``weights`` as they are served, with products in ``precision``."""
        terms = DenseTerms.of(replace(weights, correction=None), device, torch.float32)
        return cls(stored_weight(weights).to(device, precision), terms)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) float32 -> (num_tokens, out_features) float32."""
        x = self._terms.prepare_input(x)
        return self._terms.add_to(F.linear(x.to(self._weight.dtype), self._weight).to(x.dtype), x)


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
