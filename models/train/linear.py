"""One linear layer while its decoder layer is trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..scheme import ActivationScheme
from ..transform.inputs import InputTransform
from ..types import LinearWeights, QuantizedWeight
from .straight import bounded_clip, quantize_straight
from .weight import RequantizedWeight, ScaledWeight

_Formed: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""A weight as it is multiplied with, and its penalties of rounding and overflow."""


class ActivationClip(nn.Module):
    """The clip ratio of a quantized input, shared by the layers that read it.

    ratio:       scalar float32, starts as the scheme has it; block formats have none to train
    num_readers: linear layers that read the input
    """

    def __init__(self, scheme: ActivationScheme, *, is_trained: bool, num_readers: int = 1) -> None:
        super().__init__()
        self.scheme = scheme
        is_trained = is_trained and scheme.format == "int"
        self.ratio = nn.Parameter(torch.tensor(float(scheme.clip_ratio)), requires_grad=is_trained)
        self._num_readers = num_readers
        self._kept: tuple[Tensor, Tensor] | None = None
        self._num_left = 0

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) quantized."""
        return quantize_straight(x, self.scheme, self.ratio)

    def prepared(self, x: Tensor, transform: InputTransform) -> Tensor:
        """``x`` transformed and quantized; once for all that read it, who ask one after the other."""
        if self._kept is None or self._kept[0] is not x:
            self._kept, self._num_left = (x, self(transform.apply(x))), self._num_readers
        prepared = self._kept[1]
        self._num_left -= 1
        if self._num_left == 0:
            self._kept = None
        return prepared

    @property
    def merged(self) -> ActivationScheme:
        """The scheme with the ratio that was learnt."""
        if not self.ratio.requires_grad:
            return self.scheme
        return replace(self.scheme, clip_ratio=float(bounded_clip(self.ratio, self.scheme)))


class TrainableLinear(nn.Module):
    """Runs as the merged layer will, with gradients: transform, quantize, multiply.

    Args:
        weight: the trainable form of the layer's weight.
        built: the layer as the base quantizer made it.
        clip: of its input; None: activations are not quantized.
        mean_square: (in_features,), of the input: with the square of a level it weighs the penalties.
        precision: dtype of the product.
        use_checkpointing: form the weight once more on the way back instead of keeping what it was formed from.
    """

    def __init__(
        self,
        weight: ScaledWeight | RequantizedWeight,
        built: LinearWeights,
        clip: ActivationClip | None,
        mean_square: Tensor,
        *,
        precision: torch.dtype,
        use_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.clip = clip
        self._built = built
        self._precision = precision
        self._use_checkpointing = use_checkpointing
        device = mean_square.device
        scale, order, bias = built.input_scale, built.channel_order, built.bias
        self._inputs = InputTransform(
            None if scale is None else scale.to(device, torch.float32),
            None if order is None else order.to(device),
            built.rotation_block,
        )
        self._bias = None if bias is None else bias.to(device)
        self._mean_square = mean_square.float()
        self._energy = _energy(built.quantized, self._mean_square)
        self._frozen: _Formed | None = None
        self.penalty_of_rounding: Tensor | None = None
        self.penalty_of_overflow: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) float32 -> (num_tokens, out_features) float32."""
        if self._frozen is not None:
            formed = self._frozen
        elif self._use_checkpointing and torch.is_grad_enabled():
            formed = checkpoint(self._formed, use_reentrant=False)
        else:
            formed = self._formed()
        weight, self.penalty_of_rounding, self.penalty_of_overflow = formed
        x = self._inputs.apply(x) if self.clip is None else self.clip.prepared(x, self._inputs)
        product = F.linear(x.to(self._precision), weight).to(x.dtype)
        return product if self._bias is None else product + self._bias

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it the weight is formed once and for all, without gradients."""
        with torch.no_grad():
            self._frozen = self._formed()
        try:
            yield
        finally:
            self._frozen = None

    def _formed(self) -> _Formed:
        """The weight as it is multiplied with, and its penalties."""
        weights, rounding, overflow = [], [], []
        for part in self.weight.parts(self._precision):
            weights.append(part.weight)
            rounding.append(self._weighed(part.penalties.rounding, part.level))
            overflow.append(self._weighed(part.penalties.overflow, part.level))
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return weight, _total(rounding), _total(overflow)

    def _weighed(self, lost: Tensor | None, level: Tensor | None) -> Tensor | None:
        """Sum of the squares of ``lost`` (rows, in_features), in levels, as a share of what a level of every weight
        does to the output's energy: ``d_j s_i^2`` summed.
        """
        if lost is None or level is None or not lost.requires_grad:
            return None
        num_rows, num_groups, _one = level.shape
        squares = lost.square().view(num_rows, num_groups, -1) * self._mean_square.view(num_groups, -1)
        return (squares.sum(-1, keepdim=True) * level.square()).sum() / self._energy

    @torch.no_grad()
    def merged(self) -> LinearWeights:
        """What ships: a plain quantized layer."""
        activations = self._built.activations if self.clip is None else self.clip.merged
        return replace(self._built, quantized=self.weight.merged(), activations=activations)


def by_path(linears: Mapping[str, TrainableLinear]) -> nn.ModuleDict:
    """``linears``, by module path, as one module: its names may not contain dots."""
    return nn.ModuleDict({path.replace(".", "/"): linear for path, linear in linears.items()})


def _energy(quantized: QuantizedWeight, mean_square: Tensor) -> float:
    """``d_j s_i^2`` summed over the weight; 1 where that is nothing."""
    scale = quantized.scale.float().to(mean_square.device)
    energy = float((scale.square() * mean_square.view(scale.shape[1], -1).sum(-1)).sum())
    return energy if energy > 0 else 1.0


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum() if present else None
