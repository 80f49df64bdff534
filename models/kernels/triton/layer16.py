"""One weight-only layer on its device: the tensors, and one call."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ...transform.inputs import InputTransform
from ...types import LinearWeights, RowRanks
from .environment import architecture, num_processors
from .factors import PackedFactors, pack_factors
from .inputs import FusedInput
from .launch16 import LinearArguments, launch
from .layer import TritonLinear
from .pack import PackedWeight, pack_weights
from .tiles import Tile, choose_tile, tiles_of

KERNEL = "linear16"


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear16(TritonLinear):
    """weight:     codes and scales in the kernels' layout
    inputs:      divides and gathers inside the kernels
    before:      divides, gathers, rotates and rounds before them, where there is more to do than the first two
    factors:     of the low-rank term, or None
    bias:        (out_features,), or None
    tiles:       by rising number of rows
    num_processors: multiprocessors of the device
    """

    weight: PackedWeight
    inputs: InputTransform
    before: FusedInput | None
    factors: PackedFactors | None
    bias: Tensor | None
    tiles: tuple[Tile, ...]
    num_processors: int

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Self:
        """Repack ``weights`` on ``device``; bias, and factors that do not stay INT8, in ``dtype``."""
        is_before = weights.rotation_block > 0 or weights.activations is not None

        def placed(tensor: Tensor | None, target: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(device, target).contiguous()

        return cls(
            weight=pack_weights(weights, device),
            inputs=InputTransform()
            if is_before
            else InputTransform(placed(weights.input_scale, torch.float32), placed(weights.channel_order, torch.int32)),
            before=FusedInput.of(replace(weights, correction=None), device, dtype) if is_before else None,
            factors=pack_factors(weights.correction, device, dtype),
            bias=placed(weights.bias, dtype),
            tiles=tiles_of(KERNEL, architecture(device), weights.quantized.scheme.num_bits),
            num_processors=num_processors(device),
        )

    @property
    def nbytes(self) -> int:
        """See ``PreparedLinear``."""
        tensors = (self.inputs.input_scale, self.inputs.channel_order, self.bias)
        parts = (self.weight, self.before, self.factors)
        return sum(it.nbytes for it in (*parts, *tensors) if it is not None)

    def _run(self, x: Tensor, row_ranks: RowRanks | None, output: Tensor) -> Tensor:
        if self.before is not None:
            x, _ = self.before.prepare_input(x)
        factors = self.factors if row_ranks is None or row_ranks.largest > 0 else None
        arguments = LinearArguments(
            x=x.contiguous(),
            output=output,
            weight=self.weight,
            input_scale=self.inputs.input_scale,
            channel_order=self.inputs.channel_order,
            bias=self.bias,
            lora_up=None if factors is None else factors.lora_up,
            lora_down=None if factors is None else factors.lora_down,
            component_scale=None if factors is None else factors.component_scale,
            row_ranks=None if row_ranks is None else row_ranks.per_row,
        )
        launch(arguments, choose_tile(self.tiles, len(x)), self.num_processors)
        return output
