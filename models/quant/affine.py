"""Affine integer grids: ``weight ~ scale * (codes - zero_point)``, one scale per group of input channels.

Scales are stored in float16 and codes are chosen against the stored scale, never against the unrounded one, so
that rounding the scale costs nothing beyond a slightly different grid.

Asymmetric: the grid spans ``[min(w, 0), max(w, 0)]`` of the group. Zero is always inside, hence the zero point is an
integer code and a weight of zero stays exactly zero.
Symmetric: ``scale = absmax / (2**(num_bits - 1) - 1)``, centred on code ``2**(num_bits - 1)``.
"""

import torch
from torch import Tensor

from ..errors import SchemeError
from ..scheme import QuantScheme

_FLOAT16_MAX = torch.finfo(torch.float16).max
_FLOAT16_NORMAL = torch.finfo(torch.float16).smallest_normal
_FLOAT16_STEP = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps


def choose_grid(groups: Tensor, shape: tuple[int, ...], scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that span ``groups`` (out_features, num_groups, group_length) float32.

    Raises:
        SchemeError: a scale overflows float16; ``shape`` is the weight's, for the message.
    """
    if scheme.is_symmetric:
        return stored_scale(groups.abs().amax(-1) / (scheme.max_code // 2), shape, scheme), None
    low, high = groups.aminmax(dim=-1)
    return span_grid(low, high, shape, scheme)


def span_grid(low: Tensor, high: Tensor, shape: tuple[int, ...], scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the asymmetric grid from ``low`` to ``high``, widened to hold zero.

    Raises:
        SchemeError: a scale overflows float16; ``shape`` is the weight's, for the message.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored_scale((high - low) / scheme.max_code, shape, scheme)
    zero_point = (-low / scale.float()).round().clamp(0, scheme.max_code)
    return scale, zero_point.to(torch.uint8)


def stored_scale(scale: Tensor, shape: tuple[int, ...], scheme: QuantScheme) -> Tensor:
    """Round to float16, and 0 to 1. Below float16's normal range always upwards: down could halve the span.

    Raises:
        SchemeError: a scale (rows, groups) overflows; ``shape`` is the weight's, for the message.
    """
    if float(scale.max()) > _FLOAT16_MAX:
        row, group = (int(i) for i in (scale > _FLOAT16_MAX).nonzero()[0])
        raise SchemeError(
            f"a weight of shape {shape} needs a scale of {float(scale[row, group]):.3g} in row {row}, group {group} "
            f"(group_size {scheme.group_size}): more than float16 holds; scale the checkpoint down or use more bits"
        )
    tiny = (scale / _FLOAT16_STEP).ceil() * _FLOAT16_STEP
    scale = torch.where(scale < _FLOAT16_NORMAL, tiny, scale)
    return torch.where(scale == 0, 1.0, scale).to(torch.float16)


def offset(zero_point: Tensor | None, scheme: QuantScheme) -> Tensor | float:
    """Code that stands for zero."""
    return float(1 << (scheme.num_bits - 1)) if zero_point is None else zero_point.float()


def lowest_code(scheme: QuantScheme) -> int:
    """``mxint`` is sign and magnitude: the most negative code of two's complement does not exist."""
    return 1 if scheme.format == "mxint" else 0
