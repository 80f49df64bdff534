"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the rotate-half layout of Hugging Face checkpoints.

Channel i of a head and channel i + head_dim / 2 are the two coordinates of one rotating pair. Its frequency is
``theta ** (-2 i / head_dim)``, changed by the scaling that extends the context: ``linear`` divides all frequencies,
``llama3`` divides the low ones, ``dynamic`` (NTK-aware) raises theta with the length of the sequence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .config import LlamaConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, context_len: int = 0) -> Tensor:
    """Radians per position of each rotating pair, (head_dim / 2,) float32.

    Args:
        rope: the settings.
        head_dim: channels of a head.
        context_len: tokens of the sequence; matters for ``dynamic`` once it exceeds the original maximum.
    """
    theta = rope.theta
    if rope.rope_type == "dynamic":
        original = rope.original_max_position_embeddings or 1
        growth = rope.factor * max(context_len, original) / original - (rope.factor - 1)
        theta *= growth ** (head_dim / (head_dim - 2)) if head_dim > 2 else 1.0
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return frequencies / llama3_factors(rope, frequencies)
    return frequencies


def llama3_factors(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """What ``llama3`` scaling divides ``frequencies`` by: 1 for short waves, ``factor`` for long ones, a blend between.

    Args:
        rope: settings of type ``llama3``.
        frequencies: (n,) radians per position, unscaled.

    Returns:
        (n,), same dtype.
    """
    original = rope.original_max_position_embeddings or 1
    rotations = original * frequencies / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return 1.0 / ((1.0 - blend) / rope.factor + blend)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines of every row of a batch: (num_tokens, 1, head_dim / 2) each."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, num_heads, head_dim), turned by each row's position; same shape and dtype."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)


class RotaryEmbedding:
    """Makes the ``Rotary`` of a batch; all layers of a forward pass share it."""

    def __init__(self, config: LlamaConfig, device: torch.device | str = "cpu") -> None:
        self._rope = config.rope
        self._head_dim = config.head_dim
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)

    def __call__(self, batch: Batch, dtype: torch.dtype) -> Rotary:
        """Angles are taken in float32; cosines and sines come in ``dtype``, that of the activations."""
        angles = (batch.positions[:, None].float() * self._row_frequencies(batch))[:, None]
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))

    def _row_frequencies(self, batch: Batch) -> Tensor:
        """(head_dim / 2,), or (num_tokens, head_dim / 2) when sequences rotate at different frequencies."""
        original = self._rope.original_max_position_embeddings or 1
        if self._rope.rope_type != "dynamic" or all(span.context_len <= original for span in batch.spans):
            return self._frequencies
        rows = [
            inverse_frequencies(self._rope, self._head_dim, span.context_len).expand(span.num_tokens, -1)
            for span in batch.spans
        ]
        return torch.cat(rows).to(self._frequencies.device)
