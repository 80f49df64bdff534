"""Straight-through gradients (arXiv 1308.3432): forward an exact value, backward that of a smooth stand-in."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quant.activation import quantize_activations
from ..scheme import PER_TOKEN, ActivationScheme

_SMALLEST_CLIP = 0.1


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.to(surrogate.dtype, copy=True)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight(surrogate: Tensor, value: Tensor) -> Tensor:
    """``value``, bit for bit, in the dtype of ``surrogate``; its gradient goes to ``surrogate`` (same shape)."""
    result: Tensor = _Straight.apply(surrogate, value)  # type: ignore[no-untyped-call]
    return result


def straight_round(values: Tensor) -> Tensor:
    """Nearest integers; the gradient passes."""
    return straight(values, values.detach().round())


def bounded_clip(clip: Tensor, scheme: ActivationScheme) -> Tensor:
    """The clip ratio that scalar ``clip`` counts as: at most 1, and not so small that a grid serves no layer.

    At least 0.1, or what ``scheme`` starts from if that is less.
    """
    return clip.detach().clamp(min(_SMALLEST_CLIP, scheme.clip_ratio), 1.0)


class _Quantize(torch.autograd.Function):
    """Within the grid the gradient passes; beyond its ends it goes to the clip ratio, which the ends move with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, scheme: ActivationScheme) -> Tensor:
        ratio = float(bounded_clip(clip, scheme))
        quantized = quantize_activations(x, replace(scheme, clip_ratio=ratio))
        ctx.save_for_backward(x, quantized)
        ctx.ratio, ctx.scheme = ratio, scheme
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, quantized = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.ratio == 1 and not ctx.needs_input_grad[1]:
            return gradient, None, None
        is_inside = _is_inside(x, ctx.scheme, ctx.ratio)
        # x' = s q with s proportional to the ratio c: dx'/dc is (x' - x) / c where q follows x / s, else x' / c.
        slope = torch.addcmul(quantized, x, is_inside, value=-1)
        of_clip = slope.mul_(gradient).sum().div_(ctx.ratio) if ctx.needs_input_grad[1] else None
        return gradient * is_inside, of_clip, None


def _is_inside(x: Tensor, scheme: ActivationScheme, ratio: float) -> Tensor:
    """Where ``x`` (num_tokens, in_features) lies between the ends of its grid; to within half a step."""
    length = x.shape[-1] if scheme.group_size == PER_TOKEN else scheme.group_size
    groups = x.reshape(*x.shape[:-1], -1, length)
    if scheme.is_symmetric:
        high = groups.abs().amax(-1, keepdim=True) * ratio
        return (groups.abs() <= high).flatten(-2)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0) * ratio, groups.amax(-1, keepdim=True).clamp(min=0) * ratio
    return ((groups >= low) & (groups <= high)).flatten(-2)


def quantize_straight(x: Tensor, scheme: ActivationScheme, clip: Tensor) -> Tensor:
    """``quantize_activations`` with a clip ratio that learns.

    Args:
        x: (num_tokens, in_features)
        scheme: of the activations, format ``int`` unless the clip ratio is 1; its own clip ratio is replaced
        clip: scalar; counts as ``bounded_clip`` has it

    Returns:
        What ``quantize_activations`` gives for the clip ratio, bit for bit.
    """
    quantized: Tensor = _Quantize.apply(x, clip, scheme)  # type: ignore[no-untyped-call]
    return quantized
