"""A quantized layer by its definition: float64, one multiplication at a time, from the unpacked codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import FactorDtype
from models.quant.factors import store_factors
from models.quant.nf import NF4_VALUES
from models.quant.rtn import quantize_rtn
from models.scheme import ActivationScheme, QuantScheme
from models.types import Correction, Factor, LinearWeights, QuantizedWeight
from tests.support.number_formats import e2m1_values, int_asymmetric, int_symmetric, mxfp4, mxint

E2M1 = [float(number) for number, _ in e2m1_values()]
E2M1 += [-number for number in E2M1]


@dataclass(frozen=True)
class Expected:
    """value:     (num_tokens, out_features) float64
    magnitude: the same with every product replaced by its absolute value: what rounding errors are relative to
    """

    value: Tensor
    magnitude: Tensor


def expected_output(weights: LinearWeights, x: Tensor) -> Expected:
    """Loop over tokens and rows; only the tiniest shapes are bearable."""
    return expected_product(weights, prepared(weights, x))


def expected_product(weights: LinearWeights, rows: list[list[float]]) -> Expected:
    """What the layer makes of inputs that are already divided, gathered, rotated and quantized."""
    num_outputs = weights.quantized.out_features
    matrix = [_row(weights.quantized, o) for o in range(num_outputs)]
    bias = [0.0] * num_outputs if weights.bias is None else [float(value) for value in weights.bias]
    outputs = []
    for x in rows:
        low_rank = _low_rank(weights.correction, x, num_outputs)
        outputs.append([])
        for o in range(num_outputs):
            value = sum(x_i * weight for x_i, (weight, _) in zip(x, matrix[o], strict=True))
            magnitude = sum(abs(x_i) * size for x_i, (_, size) in zip(x, matrix[o], strict=True))
            outputs[-1].append((value + bias[o] + low_rank[o][0], magnitude + abs(bias[o]) + low_rank[o][1]))
    return Expected(*torch.tensor(outputs, dtype=torch.float64).unbind(-1))


def prepared(weights: LinearWeights, x: Tensor) -> list[list[float]]:
    """Input rows divided by ``input_scale``, gathered in ``channel_order``, rotated in blocks, then quantized."""
    rows = x.double().tolist()
    if weights.input_scale is not None:
        scale = weights.input_scale.tolist()
        rows = [[value / scale[i] for i, value in enumerate(row)] for row in rows]
    if weights.channel_order is not None:
        order = weights.channel_order.tolist()
        rows = [[row[i] for i in order] for row in rows]
    if weights.rotation_block:
        rows = [_rotated(row, weights.rotation_block) for row in rows]
    scheme = weights.activations
    return rows if scheme is None else [quantized_row(row, scheme) for row in rows]


def _rotated(row: list[float], block: int) -> list[float]:
    """Sylvester's matrix by its definition: the sign of entry (i, j) is the parity of the bits that i and j share."""
    signs = [[-1 if (i & j).bit_count() % 2 else 1 for j in range(block)] for i in range(block)]
    rotated: list[float] = []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        rotated += [sum(value * signs[i][j] for i, value in enumerate(part)) / block**0.5 for j in range(block)]
    return rotated


def quantized_row(row: list[float], scheme: ActivationScheme) -> list[float]:
    """The channels of one token on the grids of their groups."""
    length = len(row) if scheme.group_size == -1 else scheme.group_size
    quantized: list[float] = []
    for start in range(0, len(row), length):
        group = row[start : start + length]
        if scheme.format == "int":
            round_group = int_symmetric if scheme.is_symmetric else int_asymmetric
            quantized += round_group(group, scheme.num_bits, scheme.clip_ratio)
        else:
            values = mxfp4(group) if scheme.format == "mxfp4" else mxint(group, scheme.num_bits, scheme.exponent)
            quantized += [float(value) for value in values]
    return quantized


def _row(quantized: QuantizedWeight, o: int) -> list[tuple[float, float]]:
    """Value of each weight of row ``o``, and the size of the parts that a backend may round apart from each other."""
    scheme = quantized.scheme
    length = scheme.group_length(quantized.in_features)
    codes, scales = quantized.codes[o].tolist(), quantized.scale[o].tolist()
    table = {"mxfp4": E2M1, "nf4": list(NF4_VALUES)}.get(scheme.format)
    if table is not None:
        values = [table[code] * scales[i // length] for i, code in enumerate(codes)]
        return [(value, abs(value)) for value in values]
    middle = 2 ** (scheme.num_bits - 1)
    zeros = [middle] * len(scales) if quantized.zero_point is None else quantized.zero_point[o].tolist()
    row = []
    for i, code in enumerate(codes):
        scale, zero = scales[i // length], zeros[i // length]
        row.append((scale * (code - zero), scale * (abs(code - middle) + abs(zero - middle))))
    return row


def _low_rank(correction: Correction | None, x: list[float], num_outputs: int) -> list[tuple[float, float]]:
    if correction is None:
        return [(0.0, 0.0)] * num_outputs
    reduced = [(value, abs(value)) for value in x[: correction.rank]]
    if correction.lora_down is not None:
        products = [
            [d * x_i for d, x_i in zip(_factor_row(correction.lora_down, r), x, strict=True)]
            for r in range(correction.rank)
        ]
        reduced = [(sum(terms), sum(map(abs, terms))) for terms in products]
    return [
        (
            sum(up * value for up, (value, _) in zip(row, reduced, strict=True)),
            sum(abs(up) * magnitude for up, (_, magnitude) in zip(row, reduced, strict=True)),
        )
        for row in _up_rows(correction)
    ]


def _up_rows(correction: Correction) -> list[list[float]]:
    """lora_up, (out_features, rank): its codes are held transposed beside a lora_down."""
    if isinstance(correction.lora_up, QuantizedWeight) and correction.lora_down is not None:
        components = [_factor_row(correction.lora_up, r) for r in range(correction.rank)]
        return [list(row) for row in zip(*components, strict=True)]
    return [_factor_row(correction.lora_up, o) for o in range(len(_values(correction.lora_up)))]


def _values(factor: Factor) -> Tensor:
    return factor.codes if isinstance(factor, QuantizedWeight) else factor


def _factor_row(factor: Factor, r: int) -> list[float]:
    if isinstance(factor, QuantizedWeight):
        return [value for value, _ in _row(factor, r)]
    return [float(value) for value in factor[r].tolist()]


def random_layer(
    scheme: QuantScheme,
    shape: tuple[int, int],
    rank: int = 0,
    variant: str = "",
    has_bias: bool = False,
    *,
    factor_dtype: FactorDtype = "bfloat16",
    rotation_block: int = 0,
    activations: ActivationScheme | None = None,
) -> LinearWeights:
    """A layer of ``shape`` (out_features, in_features); ``variant`` names optional parts: scale, order, serq."""
    out_features, in_features = shape
    quantized = quantize_rtn(torch.randn(shape) * 0.05 + 0.01, scheme)
    correction = None
    if rank:
        lora_up = (torch.randn(out_features, rank) * 0.02).bfloat16()
        lora_down = None if "serq" in variant else torch.randn(rank, in_features).bfloat16()
        correction = store_factors(lora_up, lora_down, factor_dtype)
    return LinearWeights(
        quantized,
        correction,
        input_scale=torch.rand(in_features) + 0.5 if "scale" in variant else None,
        channel_order=torch.randperm(in_features).int() if "order" in variant else None,
        rotation_block=rotation_block,
        activations=activations,
        bias=torch.randn(out_features) if has_bias else None,
    )
