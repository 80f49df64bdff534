"""A quantized layer by its definition: float64, one multiplication at a time, from the unpacked codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import QuantScheme
from models.quant.rtn import quantize_rtn
from models.types import Correction, LinearWeights


@dataclass(frozen=True)
class Expected:
    """value:     (num_tokens, out_features) float64
    magnitude: the same with every product replaced by its absolute value: what rounding errors are relative to
    """

    value: Tensor
    magnitude: Tensor


def expected_output(weights: LinearWeights, x: Tensor) -> Expected:
    """Loop over tokens and rows; only the tiniest shapes are bearable."""
    rows = [[_output(weights, row, o) for o in range(weights.quantized.out_features)] for row in prepared(weights, x)]
    return Expected(*torch.tensor(rows, dtype=torch.float64).unbind(-1))


def prepared(weights: LinearWeights, x: Tensor) -> list[list[float]]:
    """Input rows divided by ``input_scale``, then gathered in ``channel_order``."""
    rows = x.double().tolist()
    if weights.input_scale is not None:
        scale = weights.input_scale.tolist()
        rows = [[value / scale[i] for i, value in enumerate(row)] for row in rows]
    if weights.channel_order is not None:
        order = weights.channel_order.tolist()
        rows = [[row[i] for i in order] for row in rows]
    return rows


def _output(weights: LinearWeights, x: list[float], o: int) -> tuple[float, float]:
    quantized = weights.quantized
    middle = 2 ** (quantized.scheme.num_bits - 1)
    length = quantized.scheme.group_length(quantized.in_features)
    codes, scales = quantized.codes[o].tolist(), quantized.scale[o].tolist()
    zeros = [middle] * len(scales) if quantized.zero_point is None else quantized.zero_point[o].tolist()
    value = magnitude = 0.0
    for i, x_i in enumerate(x):
        group = i // length
        value += x_i * scales[group] * (codes[i] - zeros[group])
        # a backend may round code * scale and zero_point * scale apart from each other
        magnitude += abs(x_i) * scales[group] * (abs(codes[i] - middle) + abs(zeros[group] - middle))
    if weights.bias is not None:
        value += float(weights.bias[o])
        magnitude += abs(float(weights.bias[o]))
    low_rank = _low_rank(weights.correction, x, o)
    return value + low_rank[0], magnitude + low_rank[1]


def _low_rank(correction: Correction | None, x: list[float], o: int) -> tuple[float, float]:
    if correction is None:
        return 0.0, 0.0
    value = magnitude = 0.0
    for r, up in enumerate(correction.lora_up[o].tolist()):
        down = [float(i == r) for i in range(len(x))]
        if correction.lora_down is not None:
            down = correction.lora_down[r].tolist()
        value += up * sum(d * x_i for d, x_i in zip(down, x, strict=True))
        magnitude += abs(up) * sum(abs(d * x_i) for d, x_i in zip(down, x, strict=True))
    return value, magnitude


def random_layer(
    scheme: QuantScheme, shape: tuple[int, int], rank: int = 0, variant: str = "", has_bias: bool = False
) -> LinearWeights:
    """A layer of ``shape`` (out_features, in_features); ``variant`` names optional parts: scale, order, serq."""
    out_features, in_features = shape
    quantized = quantize_rtn(torch.randn(shape) * 0.05 + 0.01, scheme)
    correction = None
    if rank:
        lora_up = (torch.randn(out_features, rank) * 0.02).bfloat16()
        lora_down = None if "serq" in variant else torch.randn(rank, in_features).bfloat16()
        correction = Correction(lora_up, lora_down)
    return LinearWeights(
        quantized,
        correction,
        input_scale=torch.rand(in_features) + 0.5 if "scale" in variant else None,
        channel_order=torch.randperm(in_features).int() if "order" in variant else None,
        bias=torch.randn(out_features) if has_bias else None,
    )
