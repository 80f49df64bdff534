"""One weight-only layer on its device: the tensors, and one call."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ...quant.grid import dense_factors
from ...transform.inputs import InputTransform
from ...types import LinearWeights, RowRanks
from .environment import architecture, num_processors
from .inputs import FusedInput
from .launch16 import LinearArguments, launch
from .pack import PackedWeight, pack_weights
from .tiles import Tile, choose_tile, tiles_of

KERNEL = "linear16"


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear16:
    """weight:     codes and scales in the kernels' layout
    inputs:      divides and gathers inside the kernels
    before:      divides, gathers, rotates and rounds before them, where there is more to do than the first two
    lora_up:     (rank, out_features) in the inputs' type, or None
    lora_down:   (rank, in_features); None with a ``lora_up``: the first ``rank`` channels
    bias:        (out_features,), or None
    tiles:       by rising number of rows
    num_processors: multiprocessors of the device
    """

    weight: PackedWeight
    inputs: InputTransform
    before: FusedInput | None
    lora_up: Tensor | None
    lora_down: Tensor | None
    bias: Tensor | None
    tiles: tuple[Tile, ...]
    num_processors: int

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Self:
        """Repack ``weights`` on ``device``; factors and bias in ``dtype``."""
        correction = weights.correction
        is_before = weights.rotation_block > 0 or weights.activations is not None
        has_correction = correction is not None and correction.rank > 0
        lora_up, lora_down = dense_factors(correction) if correction is not None and has_correction else (None, None)

        def placed(tensor: Tensor | None, target: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(device, target).contiguous()

        return cls(
            weight=pack_weights(weights, device),
            inputs=InputTransform()
            if is_before
            else InputTransform(placed(weights.input_scale, torch.float32), placed(weights.channel_order, torch.int32)),
            before=FusedInput.of(replace(weights, correction=None), device, dtype) if is_before else None,
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
        before = 0 if self.before is None else self.before.nbytes
        return self.weight.nbytes + before + sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def rows(self, indices: Tensor) -> Tensor:
        """See ``RowReader``."""
        return self.weight.dequantize(indices)

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """See ``PreparedLinear``."""
        output = x.new_empty(len(x), self.weight.out_features)
        if not len(x):
            return output
        if not x.is_cuda:
            return self._run(x, row_ranks, output)
        # Triton launches on torch's current device, whatever the tensors' is
        with torch.cuda.device(x.device):
            return self._run(x, row_ranks, output)

    def _run(self, x: Tensor, row_ranks: RowRanks | None, output: Tensor) -> Tensor:
        if self.before is not None:
            x, _ = self.before.prepare_input(x)
        has_rank = row_ranks is None or row_ranks.largest > 0
        arguments = LinearArguments(
            x=x.contiguous(),
            output=output,
            weight=self.weight,
            input_scale=self.inputs.input_scale,
            channel_order=self.inputs.channel_order,
            bias=self.bias,
            lora_up=self.lora_up if has_rank else None,
            lora_down=self.lora_down if has_rank else None,
            row_ranks=None if row_ranks is None else row_ranks.per_row,
        )
        launch(arguments, choose_tile(self.tiles, len(x)), self.num_processors)
        return output
