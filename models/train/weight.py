"""Trainable forms of one quantized weight: codes with scales, or factors that the weight is quantized again with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..quant.grid import dequantize, grouped
from ..types import QuantizedWeight, QuantizeFn
from .codes import Penalties, TrainableCodes, row_slices
from .straight import straight

_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Some rows of a weight in training.

    weight:    (rows, in_features) in the dtype asked for, with gradients
    penalties: what their merge loses
    level:     what one level is worth, (rows, num_groups, 1) float32; None: there are no levels
    """

    weight: Tensor
    penalties: Penalties
    level: Tensor | None


class TrainableWeight(Protocol):
    """A module that runs as a dense weight and ends as a quantized one."""

    def parts(self, dtype: torch.dtype) -> Iterator[WeightPart]:
        """The weight (out_features, in_features) with gradients, some rows at a time, rounded to ``dtype``."""
        ...

    def merged(self) -> QuantizedWeight:
        """What ships."""
        ...


class ScaledWeight(nn.Module):
    """``scale * (codes - zero_point)`` of codes that stay as they are.

    log_scale: (out_features, num_groups) float32, what the base's scales are multiplied with, as a logarithm; None:
        scales stay as they are
    """

    def __init__(self, base: QuantizedWeight, *, use_scales: bool) -> None:
        super().__init__()
        self._base = base
        self.register_buffer("_codes", base.codes, persistent=False)
        self._codes: Tensor
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

    def parts(self, dtype: torch.dtype) -> Iterator[WeightPart]:
        """As ``TrainableWeight``, in one part; nothing is lost."""
        groups = grouped(self._codes, self._base.scheme)
        weight: Tensor = _Scale.apply(groups, self._offset, self._scales(), dtype)  # type: ignore[no-untyped-call]
        yield WeightPart(weight, Penalties(), None)

    @torch.no_grad()
    def merged(self) -> QuantizedWeight:
        """As ``TrainableWeight``: the base's zero points, and its scales or the trained ones."""
        return self._with_codes(self._codes)

    def _with_codes(self, codes: Tensor) -> QuantizedWeight:
        zero_point = self._base.zero_point
        zero_point = None if zero_point is None else zero_point.to(self._scale.device)
        return QuantizedWeight(codes, self._scales().half(), zero_point, self._base.scheme)


class _Scale(torch.autograd.Function):
    """``scale * (codes - offset)``; on the way back the scales' gradient alone, from the codes: nothing else is kept.

    Row by row as ``row_slices`` has it, so that what is neither codes nor weight never leaves the cache.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, offset: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(groups, offset)
        weight = torch.empty(groups.shape, dtype=dtype, device=groups.device)
        for rows in row_slices(groups):
            weight[rows] = _levels(groups, offset, rows).mul_(scale[rows, :, None])
        return weight.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, None]:
        groups, offset = ctx.saved_tensors
        gradient = gradients[0].view(groups.shape)
        slope = torch.empty(groups.shape[:2], dtype=torch.float32, device=groups.device)
        for rows in row_slices(groups):
            torch.sum(_levels(groups, offset, rows).mul_(gradient[rows]), -1, out=slope[rows])
        return None, None, slope, None


def _levels(groups: Tensor, offset: Tensor, rows: slice) -> Tensor:
    """Codes of ``rows`` as signed levels, (rows, num_groups, group_length) float32."""
    return groups[rows].float().sub_(offset if offset.dim() == 0 else offset[rows, :, None])


class MergedWeight(ScaledWeight):
    """``scale * (codes - zero_point)`` of trainable codes and scales; a merge changes neither number."""

    def __init__(self, codes: TrainableCodes, base: QuantizedWeight, *, use_scales: bool) -> None:
        super().__init__(base, use_scales=use_scales)
        self.codes = codes

    def parts(self, dtype: torch.dtype) -> Iterator[WeightPart]:
        """As ``TrainableWeight``."""
        factors, scales = self.codes.factors(), self._scales()
        has_common_offset = self._offset.dim() == 0
        for rows in self.codes.row_slices:
            codes, penalties = self.codes.part(rows, *factors)
            offset = self._offset if has_common_offset else self._offset[rows, :, None]
            weight = ((grouped(codes, self._base.scheme) - offset) * scales[rows, :, None]).flatten(1)
            yield WeightPart(weight.to(dtype), penalties, self._scale[rows, :, None])

    @torch.no_grad()
    def merged(self) -> QuantizedWeight:
        """As ``TrainableWeight``: the base's zero points, and its scales or the trained ones."""
        return self._with_codes(self.codes.merged())


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

    def parts(self, dtype: torch.dtype) -> Iterator[WeightPart]:
        """As ``TrainableWeight``, in one part; what is lost shows in the merge only."""
        yield WeightPart((self._dequantized + self._product()).to(dtype), Penalties(), None)

    @torch.no_grad()
    def merged(self) -> QuantizedWeight:
        """As ``TrainableWeight``: by the base's own quantizer."""
        return self._quantize(self._weight + self._product())
