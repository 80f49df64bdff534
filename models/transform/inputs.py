"""What happens to the input of a linear layer before it is quantized and multiplied: divide, gather, rotate.

Each step has its counterpart on the weight, so that the layer's output stays what it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hadamard import rotate, unrotate


@dataclass(frozen=True, slots=True)
class InputTransform:
    """The fields of the same names of ``LinearWeights``; ``InputTransform()`` changes nothing."""

    input_scale: Tensor | None = None
    channel_order: Tensor | None = None
    rotation_block: int = 0

    def apply(self, x: Tensor) -> Tensor:
        """``x`` (..., in_features) as the layer's codes and factors expect it, same dtype."""
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        if self.channel_order is not None:
            x = x.index_select(-1, self.channel_order)
        return rotate(x, self.rotation_block) if self.rotation_block else x

    def weight(self, weight: Tensor) -> Tensor:
        """The weight (out_features, in_features) that makes of ``apply(x)`` what ``weight`` makes of x."""
        if self.input_scale is not None:
            weight = (weight * self.input_scale).to(weight.dtype)
        if self.channel_order is not None:
            weight = weight.index_select(1, self.channel_order)
        return rotate(weight, self.rotation_block) if self.rotation_block else weight

    def undo(self, weight: Tensor) -> Tensor:
        """The weight (out_features, in_features) that makes of x what ``weight`` makes of ``apply(x)``."""
        if self.rotation_block:
            weight = unrotate(weight, self.rotation_block)
        if self.channel_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.channel_order.long(), weight)
        return weight if self.input_scale is None else weight / self.input_scale.to(weight.dtype)
