"""Affine integer quantization: ``weight ~ scale * (codes - zero_point)``, one scale per group of input channels.

Scales are stored in float16 and codes are chosen against the stored scale, never against the unrounded one, so
that rounding the scale costs nothing beyond a slightly different grid.

Asymmetric: the grid spans ``[min(w, 0), max(w, 0)]`` of the group. Zero is always inside, hence the zero point is an
integer code and a weight of zero stays exactly zero.
Symmetric: ``scale = absmax / (2**(num_bits - 1) - 1)``, centred on code ``2**(num_bits - 1)``.
"""

import torch
from torch import Tensor

from ..config import QuantScheme
from ..errors import SchemeError
from ..types import QuantizedWeight

_FLOAT16_MAX = torch.finfo(torch.float16).max
_FLOAT16_NORMAL = torch.finfo(torch.float16).smallest_normal
_FLOAT16_STEP = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> QuantizedWeight:
    """Round ``weight`` to the nearest codes of the grid given by ``scale`` and ``zero_point``.

    Args:
        weight: (out_features, in_features), finite
        scale: (out_features, num_groups) float16, positive
        zero_point: (out_features, num_groups) uint8, or None when symmetric
        scheme: format of the result
    """
    steps = _grouped(weight.float(), scheme) / scale.float()[:, :, None]
    codes = steps.round_().add_(_offset(zero_point, scheme)).clamp_(0, scheme.max_code)
    return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale, zero_point, scheme)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The weight that the codes stand for: (out_features, in_features) float32, exact.

    A float16 scale times an integer of at most 8 bits fits in float32 without rounding.
    """
    scheme = quantized.scheme
    steps = _grouped(quantized.codes.float(), scheme) - _offset(quantized.zero_point, scheme)
    return steps.mul_(quantized.scale.float()[:, :, None]).flatten(1)


def choose_grid(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that span each group of ``weight`` (out_features, in_features).

    Returns:
        scale (out_features, num_groups) float16, finite and positive; zero_point (out_features, num_groups) uint8, or
        None when symmetric. A group of zeros gets scale 1 and is reproduced exactly.

    Raises:
        SchemeError: not a matrix, groups that do not tile the rows, a weight that is not finite, or one so large that
            its scale overflows float16.
    """
    _check_weight(weight, scheme)
    groups = _grouped(weight.float(), scheme)
    if scheme.is_symmetric:
        absmax = groups.abs().amax(-1)
        return _stored_scale(absmax / (scheme.max_code // 2), tuple(weight.shape), scheme), None
    low, high = (bound.float() for bound in groups.aminmax(dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored_scale((high - low) / scheme.max_code, tuple(weight.shape), scheme)
    zero_point = (-low / scale.float()).round().clamp(0, scheme.max_code)
    return scale, zero_point.to(torch.uint8)


def _check_weight(weight: Tensor, scheme: QuantScheme) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SchemeError(f"a weight is a floating-point matrix, not {weight.dtype} of shape {tuple(weight.shape)}")
    where = f"a weight of shape {tuple(weight.shape)}"
    if 0 in weight.shape:
        raise SchemeError(f"{where} is empty and cannot be quantized")
    scheme.check(weight.shape[1], where)
    finite = weight.isfinite()
    if not finite.all():
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise SchemeError(
            f"{where} holds {float(weight[row, column])} at row {row}, column {column}; it must be finite"
        )


def _stored_scale(scale: Tensor, shape: tuple[int, ...], scheme: QuantScheme) -> Tensor:
    """Round to float16. Below its normal range always upwards: rounding down there could halve the span."""
    if float(scale.max()) > _FLOAT16_MAX:
        row, group = (int(i) for i in (scale > _FLOAT16_MAX).nonzero()[0])
        raise SchemeError(
            f"a weight of shape {shape} needs a scale of {float(scale[row, group]):.3g} in row {row}, group {group} "
            f"(group_size {scheme.group_size}): more than float16 holds; scale the checkpoint down or use more bits"
        )
    tiny = (scale / _FLOAT16_STEP).ceil() * _FLOAT16_STEP
    scale = torch.where(scale < _FLOAT16_NORMAL, tiny, scale)
    return torch.where(scale == 0, 1.0, scale).to(torch.float16)


def _grouped(values: Tensor, scheme: QuantScheme) -> Tensor:
    """(out_features, in_features) -> (out_features, num_groups, group_length)."""
    return values.reshape(values.shape[0], -1, scheme.group_length(values.shape[1]))


def _offset(zero_point: Tensor | None, scheme: QuantScheme) -> Tensor | float:
    """Code that stands for zero, broadcastable over grouped codes."""
    return float(1 << (scheme.num_bits - 1)) if zero_point is None else zero_point.float()[:, :, None]
