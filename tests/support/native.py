"""The native kernels for tests, which are skipped with the reason where there are none; and what layers must give."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from models.kernels.native.factors import RANK_BLOCK, ByteFactors, byte_factors
from models.kernels.native.inputs import ActivationBits
from models.kernels.native.runtime import Runtime, default_runtime
from models.quant.activation import quantize_activations
from models.quant.grid import dequantize
from models.transform.inputs import InputTransform
from models.types import LinearWeights

LARGEST_CODE = {8: 127, 16: 127 * 256}

_RUNTIME = default_runtime()
needs_native = pytest.mark.skipif(isinstance(_RUNTIME, str), reason=f"native kernels: {_RUNTIME}")


def runtime() -> Runtime:
    """The kernels of this machine."""
    if isinstance(_RUNTIME, str):
        pytest.skip(_RUNTIME)
    return _RUNTIME


@dataclass(frozen=True)
class Product:
    """value:  (num_rows, out_features) float64
    magnitude: the same of absolute values, what float32's rounding is relative to
    rounding:  the most that 16-bit codes of the low-rank term's reduced rows may be off
    """

    value: Tensor
    magnitude: Tensor
    rounding: Tensor


def rounded_inputs(weights: LinearWeights, x: Tensor, block: int, bits: ActivationBits) -> Tensor:
    """``x`` (num_rows, in_features) float32 divided, gathered, rotated, and rounded to the grid that the layer gets."""
    x = InputTransform(weights.input_scale, weights.channel_order, weights.rotation_block).apply(x)
    if weights.activations is not None:
        return quantize_activations(x, weights.activations)
    groups = x.reshape(len(x), -1, block)
    scale = (groups.abs().amax(-1, keepdim=True) / LARGEST_CODE[bits]).clamp(min=torch.finfo(torch.float32).tiny)
    return ((groups / scale).round() * scale).flatten(1)


def expected_product(weights: LinearWeights, inputs: Tensor, block: int, rank: int | None = None) -> Product:
    """What the kernels make of rounded ``inputs``, summed in float64; with the first ``rank`` components only."""
    x, weight = inputs.double(), dequantize(weights.quantized).double()
    value, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    rounding = torch.zeros_like(value)
    if weights.correction is not None:
        factors = byte_factors(weights.correction, block)
        up, reduced = factors.lora_up.values().double(), reduced_inputs(factors, x).clone()
        reduced[:, factors.rank if rank is None else rank :] = 0
        value, magnitude = value + reduced @ up.T, magnitude + reduced.abs() @ up.abs().T
        if factors.lora_down is not None:
            largest = reduced.abs().view(len(x), -1, RANK_BLOCK).amax(-1, keepdim=True)
            half_steps = (largest / LARGEST_CODE[16] / 2).expand(-1, -1, RANK_BLOCK).flatten(1)
            rounding = half_steps @ up.abs().T
    if weights.bias is not None:
        value, magnitude = value + weights.bias.double(), magnitude + weights.bias.double().abs()
    return Product(value, magnitude, rounding)


def reduced_inputs(factors: ByteFactors, x: Tensor) -> Tensor:
    """(num_rows, rank up to a multiple of 32): the products with ``lora_down``, or the first channels."""
    if factors.lora_down is None:
        return x[:, : factors.lora_up.codes.shape[1]]
    return x @ factors.lora_down.values().double().T
