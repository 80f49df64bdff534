"""Parameters of a decoder layer during a build: linear layers in any form, norms as the checkpoint has them."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..llama.checkpoint import Checkpoint, DenseWeights


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
