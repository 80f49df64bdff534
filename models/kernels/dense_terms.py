"""The part of a layer that is not integer: input preparation, bias, low-rank term. All torch backends share it."""

from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import LinearWeights


@dataclass(frozen=True, slots=True)
class DenseTerms:
    """Tensors of one layer besides its codes, on their final device.

    input_scale:   (in_features,) float32 or None
    channel_order: (in_features,) int32 or None
    lora_up:       (out_features, rank), or None
    lora_down:     (rank, in_features); None with a ``lora_up``: the first ``rank`` channels
    bias:          (out_features,) in the activation dtype, or None
    The factors are float32 on the CPU: for one row of a small layer, torch's bfloat16 products cost 160 microseconds
    where its float32 ones cost 67. Elsewhere they have the activation dtype.
    """

    input_scale: Tensor | None
    channel_order: Tensor | None
    lora_up: Tensor | None
    lora_down: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the terms of ``weights`` to ``device``, bias in ``dtype``."""
        correction = weights.correction
        factor_dtype = torch.float32 if device.type == "cpu" else dtype

        def placed(tensor: Tensor | None, target: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(device, target).contiguous()

        return cls(
            input_scale=placed(weights.input_scale, torch.float32),
            channel_order=placed(weights.channel_order, torch.int32),
            lora_up=placed(None if correction is None else correction.lora_up, factor_dtype),
            lora_down=placed(None if correction is None else correction.lora_down, factor_dtype),
            bias=placed(weights.bias, dtype),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def prepare_input(self, x: Tensor) -> Tensor:
        """``x`` (num_tokens, in_features) as the codes and the factors expect it: divided, then gathered."""
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        return x if self.channel_order is None else x.index_select(1, self.channel_order)

    def add_to(self, product: Tensor, x: Tensor) -> Tensor:
        """Bias and low-rank term added to ``product`` (num_tokens, out_features), in place.

        Args:
            product: ``x`` times the dequantized weight
            x: (num_tokens, in_features), prepared
        """
        if self.bias is not None:
            product += self.bias
        if self.lora_up is None:
            return product
        x = x.to(self.lora_up.dtype)
        reduced = x[:, : self.lora_up.shape[1]] if self.lora_down is None else F.linear(x, self.lora_down)
        return product.add_(F.linear(reduced, self.lora_up))
