"""What a layer with 16-bit inputs computes, in float64, with a bound of the error that its roundings allow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.dense_terms import DenseTerms
from models.quant.factors import FACTOR_SCHEMES
from models.quant.grid import dense_factors, dequantize
from models.types import Correction, LinearWeights, QuantizedWeight, RowRanks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bounded:
    """value: (num_rows, out_features) float64; bound: what a result may differ from it by, element by element."""

    value: Tensor
    bound: Tensor


def bounded_output(
    weights: LinearWeights, x: Tensor, row_ranks: RowRanks | None = None, *, is_truncating: bool = False
) -> Bounded:
    """The layer's output for ``x`` (num_rows, in_features).

    Roundings to the inputs' type (relative error u): of a weight, of the down-product, of the output. Sums are float32:
    n terms in any order err by ``n u32 / (1 - n u32)`` of the sum of magnitudes (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2). n counts the few roundings more of a product of scale, zero and table.

    Args:
        weights: the layer.
        x: inputs; their preparation rounds as ``DenseTerms`` does, it is not part of the bound.
        row_ranks: components of each row.
        is_truncating: bfloat16 is rounded towards zero, as Triton's interpreter does it: u twice as large.
    """
    u = torch.finfo(x.dtype).eps / (1 if is_truncating and x.dtype == torch.bfloat16 else 2)
    rank = 0 if weights.correction is None else weights.correction.rank
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    terms = (x.shape[1] + rank + 8) * 2.0**-24
    gamma = terms / (1 - terms)
    inputs = DenseTerms.of(weights, CPU, x.dtype).prepare_input(x.cpu()).double()
    matrix = dequantize(weights.quantized).double()
    value, magnitude = inputs @ matrix.T, inputs.abs() @ matrix.abs().T
    error = (u + gamma * (1 + u)) * magnitude
    if weights.correction is not None and rank:
        up, down = kernel_factors(weights.correction, x.dtype)
        reduced = inputs[:, :rank] if down is None else inputs @ down.T
        sizes = inputs[:, :rank].abs() if down is None else inputs.abs() @ down.abs().T
        if row_ranks is not None:
            reduced, sizes = row_ranks.keep(reduced), row_ranks.keep(sizes)
        value = value + reduced @ up.T
        error = error + (u + 2 * gamma * (1 + u)) * (sizes @ up.abs().T) + rank * smallest
    if weights.bias is not None:
        bias = weights.bias.to(x.dtype).double()
        value, error = value + bias, error + gamma * bias.abs()
    return Bounded(value, error + u * (value.abs() + error) + smallest)


def kernel_factors(correction: Correction, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """lora_up (out_features, rank) and lora_down or None, float64, as the kernels have them.

    A pair in INT8 with a scale per component is exact: its codes fit 16-bit numbers, and the scales meet float32 sums.
    Others are rounded to ``dtype``.
    """
    up, down = dense_factors(correction)
    stored = (correction.lora_up, correction.lora_down)
    if all(isinstance(it, QuantizedWeight) and it.scheme == FACTOR_SCHEMES["int8"] for it in stored):
        assert down is not None
        return up.double(), down.double()
    return up.to(dtype).double(), None if down is None else down.to(dtype).double()


def assert_bounded(found: Tensor, expected: Bounded, dtype: torch.dtype, *, is_truncating: bool = False) -> None:
    """Every element within its bound, and all together as close as roundings of random sign leave them."""
    assert found.dtype == dtype
    error = (found.cpu().double() - expected.value).abs()
    assert (error <= expected.bound).all(), f"{float((error / expected.bound).max()):.2f} of the bound"
    u = torch.finfo(dtype).eps / (1 if is_truncating and dtype == torch.bfloat16 else 2)
    # a scale, zero point or order that is wrong cannot hide in the sum of magnitudes
    assert float(error.norm()) <= 2 * u * float(expected.value.norm())
