"""A network of random weights for any device, on whatever kernels suit it there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import AUTO, get_backends
from ..layers.linear import LowRankLinear
from ..llama.config import LlamaConfig
from ..llama.model import LlamaForCausalLM
from .contenders import random_linear
from .roofline import W4A16, Scheme, Shape


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """A weight source: norms of one, a 16-bit embedding and head, layers of ``scheme`` with terms of ``rank``."""

    config: LlamaConfig
    device: torch.device
    dtype: torch.dtype
    rank: int
    scheme: Scheme = W4A16
    backend: str = AUTO

    def tensor(self, name: str) -> Tensor:
        """Norms of one; the embedding and head are small random numbers."""
        shape = self.config.tensor_shapes()[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.02)

    def linear(self, path: str) -> nn.Module:
        """The quantized layer at module ``path``."""
        shape = self.config.linear_shapes()[path]
        size = Shape(self.config.model_type, path, shape.out_features, shape.in_features)
        weights = random_linear(size, self.scheme, self.rank, self.device)
        backends = get_backends(self.backend)
        return LowRankLinear.of(weights, backends, device=self.device, dtype=self.dtype, where=path)


def random_network(
    config: LlamaConfig,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scheme: Scheme = W4A16,
    backend: str = AUTO,
) -> LlamaForCausalLM:
    """A network of ``config``'s shape on ``device``; ``backend`` as ``get_backends`` takes it."""
    return LlamaForCausalLM(config, RandomWeights(config, device, dtype, rank, scheme, backend))


def step_bytes(network: LlamaForCausalLM) -> int:
    """Bytes of weights that a decode step reads: linear layers as their kernels keep them, and the head."""
    linears = (module for module in network.modules() if isinstance(module, LowRankLinear))
    head = network.config.vocab_size * network.config.hidden_size * torch.finfo(network.dtype).bits // 8
    return sum(linear.nbytes for linear in linears) + head
