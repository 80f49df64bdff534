"""One linear layer while its decoder layer is trained."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..scheme import ActivationScheme
from ..transform.inputs import InputTransform
from ..types import LinearWeights
from .straight import bounded_clip, quantize_straight
from .weight import MergedWeight, RequantizedWeight


class ActivationClip(nn.Module):
    """The clip ratio of a quantized input, shared by the layers that read it.

    ratio: scalar float32, starts as the scheme has it; block formats have none to train
    """

    def __init__(self, scheme: ActivationScheme, *, is_trained: bool) -> None:
        super().__init__()
        self.scheme = scheme
        is_trained = is_trained and scheme.format == "int"
        self.ratio = nn.Parameter(torch.tensor(float(scheme.clip_ratio)), requires_grad=is_trained)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) quantized."""
        return quantize_straight(x, self.scheme, self.ratio)

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
        weight: MergedWeight | RequantizedWeight,
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
        energy = float(self._importance().mean())
        self._energy = energy if energy > 0 else 1.0
        self.penalty_of_rounding: Tensor | None = None
        self.penalty_of_overflow: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) float32 -> (num_tokens, out_features) float32."""
        if self._use_checkpointing and torch.is_grad_enabled():
            formed = checkpoint(self._formed, use_reentrant=False)
        else:
            formed = self._formed()
        weight, self.penalty_of_rounding, self.penalty_of_overflow = formed
        x = self._inputs.apply(x)
        x = x if self.clip is None else self.clip(x)
        product = F.linear(x.to(self._precision), weight).to(x.dtype)
        return product if self._bias is None else product + self._bias

    def _formed(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weight as it is multiplied with, and its penalties."""
        weight, penalties = self.weight()
        return weight.to(self._precision), self._weighed(penalties.rounding), self._weighed(penalties.overflow)

    def _weighed(self, lost: Tensor | None) -> Tensor | None:
        """Mean of the squares of ``lost`` (in levels), weighed by what they do to the output's energy."""
        if lost is None or not lost.requires_grad:
            return None
        return (lost.square() * self._importance()).mean() / self._energy

    def _importance(self) -> Tensor:
        """``d_j s_i^2``, what a level of each weight does to the output's energy: (out_features, in_features)."""
        level = self.weight.level if isinstance(self.weight, MergedWeight) else 1.0
        return self._mean_square * level**2

    @torch.no_grad()
    def merged(self) -> LinearWeights:
        """What ships: a plain quantized layer."""
        activations = self._built.activations if self.clip is None else self.clip.merged
        return replace(self._built, quantized=self.weight.merged(), activations=activations)
