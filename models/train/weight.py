"""Trainable forms of one quantized weight: codes with scales, or factors that the weight is quantized again with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..quant.grid import dequantize, grouped
from ..types import QuantizedWeight, QuantizeFn
from .codes import Penalties, TrainableCodes
from .straight import straight

_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Some rows of a weight in training.

    weight:    (rows, in_features) float32, with gradients
    penalties: what their merge loses
    level:     what one level is worth, (rows, num_groups, 1) float32; None: there are no levels
    """

    weight: Tensor
    penalties: Penalties
    level: Tensor | None


class TrainableWeight(Protocol):
    """A module that runs as a dense weight and ends as a quantized one."""

    def parts(self) -> Iterator[WeightPart]:
        """The weight (out_features, in_features) float32 with gradients, some rows at a time."""
        ...

    def merged(self) -> QuantizedWeight:
        """What ships."""
        ...


class MergedWeight(nn.Module):
    """``scale * (codes - zero_point)`` of trainable codes and scales; a merge changes neither number.

    log_scale: (out_features, num_groups) float32, what the base's scales are multiplied with, as a logarithm; None:
        scales stay as they are
    """

    def __init__(self, codes: TrainableCodes, base: QuantizedWeight, *, use_scales: bool) -> None:
        super().__init__()
        self.codes = codes
        self._base = base
        self.register_buffer("_scale", base.scale.float(), persistent=False)
        offset = 1 << (base.scheme.num_bits - 1) if base.zero_point is None else base.zero_point.float()
        self.register_buffer("_offset", torch.as_tensor(offset, dtype=torch.float32), persistent=False)
        self._scale: Tensor
        self._offset: Tensor
        self.log_scale = nn.Parameter(torch.zeros_like(self._scale)) if use_scales else None

    def _scales(self) -> Tensor:
        """Scales as float16 holds them, in float32, with gradients."""
        if self.log_scale is None:
            return self._scale
        scale = self._scale * self.log_scale.exp()
        return straight(scale, scale.detach().clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half())

    def parts(self) -> Iterator[WeightPart]:
        """As ``TrainableWeight``."""
        factors, scales = self.codes.factors(), self._scales()
        has_common_offset = self._offset.dim() == 0
        for rows in self.codes.row_slices:
            codes, penalties = self.codes.part(rows, *factors)
            offset = self._offset if has_common_offset else self._offset[rows, :, None]
            weight = ((grouped(codes, self._base.scheme) - offset) * scales[rows, :, None]).flatten(1)
            yield WeightPart(weight, penalties, self._scale[rows, :, None])

    @torch.no_grad()
    def merged(self) -> QuantizedWeight:
        """As ``TrainableWeight``: the base's zero points, and its scales or the trained ones."""
        zero_point = self._base.zero_point
        return QuantizedWeight(
            self.codes.merged(),
            self._scales().half(),
            None if zero_point is None else zero_point.to(self._scale.device),
            self._base.scheme,
        )


class RequantizedWeight(nn.Module):
    """Float factors beside the quantized weight while training; merging adds them to the dense one and quantizes again.

    The mismatch is the point: this is the control (error correction of QLLM, arXiv 2310.08041).
    """

    def __init__(
        self, weight: Tensor, base: QuantizedWeight, quantize: QuantizeFn, lora_up: Tensor, lora_down: Tensor
    ) -> None:
        super().__init__()
        self._quantize = quantize
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("_dequantized", dequantize(base), persistent=False)
        self._weight: Tensor
        self._dequantized: Tensor
        self.lora_up = nn.Parameter(lora_up.float())
        self.lora_down = nn.Parameter(lora_down.float())

    def _product(self) -> Tensor:
        with torch.autocast(self.lora_up.device.type, enabled=False):
            return self.lora_up @ self.lora_down / self.lora_up.shape[1]

    def parts(self) -> Iterator[WeightPart]:
        """As ``TrainableWeight``, in one part; what is lost shows in the merge only."""
        yield WeightPart(self._dequantized + self._product(), Penalties(), None)

    @torch.no_grad()
    def merged(self) -> QuantizedWeight:
        """As ``TrainableWeight``: by the base's own quantizer."""
        return self._quantize(self._weight + self._product())
