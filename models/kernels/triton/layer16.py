"""One weight-only layer on its device: the tensors, and one call."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...quant.activation import quantize_activations
from ...quant.grid import dense_factors
from ...scheme import ActivationScheme
from ...transform.inputs import InputTransform
from ...types import LinearWeights, RowRanks
from .environment import architecture, num_processors
from .launch16 import LinearArguments, launch
from .pack import PackedWeight, pack_weights
from .tiles import Tile, choose_tile, tiles_of

KERNEL = "linear16"


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear16:
    """weight:     codes and scales in the kernels' layout
    inputs:      divides and gathers inside the kernels; with a rotation all of it happens before them
    activations: how inputs are rounded, before the kernels; None: not at all
    lora_up:     (rank, out_features) in the inputs' type, or None
    lora_down:   (rank, in_features); None with a ``lora_up``: the first ``rank`` channels
    bias:        (out_features,), or None
    tiles:       by rising number of rows
    num_processors: multiprocessors of the device
    """

    weight: PackedWeight
    inputs: InputTransform
    activations: ActivationScheme | None
    lora_up: Tensor | None
    lora_down: Tensor | None
    bias: Tensor | None
    tiles: tuple[Tile, ...]
    num_processors: int

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Self:
        """Repack ``weights`` on ``device``; factors and bias in ``dtype``."""
        correction = weights.correction
        has_correction = correction is not None and correction.rank > 0
        lora_up, lora_down = dense_factors(correction) if correction is not None and has_correction else (None, None)

        def placed(tensor: Tensor | None, target: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(device, target).contiguous()

        return cls(
            weight=pack_weights(weights, device),
            inputs=InputTransform(
                placed(weights.input_scale, torch.float32),
                placed(weights.channel_order, torch.int32),
                weights.rotation_block,
            ),
            activations=weights.activations,
            lora_up=None if lora_up is None else placed(lora_up.T, dtype),
            lora_down=placed(lora_down, dtype),
            bias=placed(weights.bias, dtype),
            tiles=tiles_of(KERNEL, architecture(device), weights.quantized.scheme.num_bits),
            num_processors=num_processors(device),
        )

    @property
    def nbytes(self) -> int:
        """See ``PreparedLinear``."""
        tensors = (self.inputs.input_scale, self.inputs.channel_order, self.lora_up, self.lora_down, self.bias)
        return self.weight.nbytes + sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def rows(self, indices: Tensor) -> Tensor:
        """See ``RowReader``."""
        return self.weight.dequantize(indices)

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """See ``PreparedLinear``."""
        output = x.new_empty(len(x), self.weight.out_features)
        if not len(x):
            return output
        x, inputs = self._rotated_and_rounded(x)
        has_rank = row_ranks is None or row_ranks.largest > 0
        arguments = LinearArguments(
            x=x.contiguous(),
            output=output,
            weight=self.weight,
            input_scale=inputs.input_scale,
            channel_order=inputs.channel_order,
            bias=self.bias,
            lora_up=self.lora_up if has_rank else None,
            lora_down=self.lora_down if has_rank else None,
            row_ranks=None if row_ranks is None else row_ranks.per_row,
        )
        tile = choose_tile(self.tiles, len(x))
        if not x.is_cuda:
            launch(arguments, tile, self.num_processors)
            return output
        # Triton launches on torch's current device, whatever the tensors' is
        with torch.cuda.device(x.device):
            launch(arguments, tile, self.num_processors)
        return output

    def _rotated_and_rounded(self, x: Tensor) -> tuple[Tensor, InputTransform]:
        """``x`` as far as the kernels do not prepare it, and what is left to them."""
        if not self.inputs.rotation_block and self.activations is None:
            return x, self.inputs
        x = self.inputs.apply(x)
        return x if self.activations is None else quantize_activations(x, self.activations), InputTransform()
