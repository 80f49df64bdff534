"""Grids of every number format behind one set of functions: choose a grid, round to it, come back from it.

``encode`` and ``decode`` work value by value with whatever scales broadcast, so quantizers that go column by column
(GPTQ) and those that take a whole weight share them.
"""

import torch
from torch import Tensor

from ..scheme import QuantScheme
from ..types import Correction, Factor, QuantizedWeight
from . import affine, mx, nf
from .checks import check_weight


def choose_grid(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that span each group of ``weight`` (out_features, in_features).

    Returns:
        scale (out_features, num_groups), finite and positive, float16 or bfloat16 as ``QuantizedWeight`` has it;
        zero_point (out_features, num_groups) uint8, or None when symmetric. A group of zeros is reproduced exactly.

    Raises:
        SchemeError: not a matrix, groups that do not tile the rows, a weight that is not finite, or one so large that
            its scale overflows.
    """
    check_weight(weight, scheme)
    groups = grouped(weight.float(), scheme)
    if scheme.has_exponent_scale:
        return mx.choose_scale(groups, scheme), None
    if scheme.format == "nf4":
        return affine.stored_scale(groups.abs().amax(-1), tuple(weight.shape), scheme), None
    return affine.choose_grid(groups, tuple(weight.shape), scheme)


def encode(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Nearest codes, uint8, of ``values`` on the grid; ``scale`` and ``zero_point`` broadcast against ``values``."""
    steps = values.float() / scale.float()
    if scheme.format == "mxfp4":
        return mx.encode_e2m1(steps)
    if scheme.format == "nf4":
        return nf.encode(steps)
    codes = steps.round_().add_(affine.offset(zero_point, scheme)).clamp_(affine.lowest_code(scheme), scheme.max_code)
    return codes.to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What ``codes`` stand for, float32, exact; ``scale`` and ``zero_point`` broadcast against ``codes``.

    A float16 scale times an integer of at most 8 bits, and a power of two times anything, fit in float32 unrounded.
    """
    if scheme.format == "mxfp4":
        return mx.decode_e2m1(codes) * scale.float()
    if scheme.format == "nf4":
        return nf.decode(codes) * scale.float()
    return codes.float().sub_(affine.offset(zero_point, scheme)).mul_(scale.float())


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> QuantizedWeight:
    """Round ``weight`` to the nearest codes of the grid given by ``scale`` and ``zero_point``.

    Args:
        weight: (out_features, in_features), finite
        scale: (out_features, num_groups), positive
        zero_point: (out_features, num_groups) uint8, or None when symmetric
        scheme: format of the result
    """
    zero = None if zero_point is None else zero_point[:, :, None]
    codes = encode(grouped(weight, scheme), scale[:, :, None], zero, scheme)
    return QuantizedWeight(codes.flatten(1), scale, zero_point, scheme)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The weight that the codes stand for: (out_features, in_features) float32, exact."""
    zero_point = quantized.zero_point
    zero = None if zero_point is None else zero_point[:, :, None]
    codes = grouped(quantized.codes, quantized.scheme)
    return decode(codes, quantized.scale[:, :, None], zero, quantized.scheme).flatten(1)


def dequantize_rows(quantized: QuantizedWeight, indices: Tensor) -> Tensor:
    """Rows ``indices`` (n,) of ``dequantize(quantized)`` without the others: (n, in_features) float32."""
    return dequantize(quantized.rows(indices))


def grouped(values: Tensor, scheme: QuantScheme) -> Tensor:
    """(out_features, in_features) -> (out_features, num_groups, group_length)."""
    return values.reshape(values.shape[0], -1, scheme.group_length(values.shape[1]))


def dense_factors(correction: Correction) -> tuple[Tensor, Tensor | None]:
    """lora_up (out_features, rank) and lora_down (rank, in_features) or None, dequantized where they are codes."""
    if correction.lora_down is None:
        return _dense(correction.lora_up), None
    lora_up = _dense(correction.lora_up)
    is_transposed = isinstance(correction.lora_up, QuantizedWeight)
    return lora_up.T if is_transposed else lora_up, _dense(correction.lora_down)


def _dense(factor: Factor) -> Tensor:
    return dequantize(factor) if isinstance(factor, QuantizedWeight) else factor
