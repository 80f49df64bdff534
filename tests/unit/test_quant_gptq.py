"""GPTQ, against optimal brain quantization written out: float64, one column at a time, inverses recomputed."""

import itertools

import pytest
import torch
from torch import Tensor

from models.errors import CalibrationError, SchemeError
from models.quant.gptq import factorize, quantize_gptq
from models.quant.grid import choose_grid, decode, dequantize
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.types import QuantizedWeight

SCHEMES = [
    QuantScheme(4, 32),
    QuantScheme(2, 16, is_symmetric=True),
    QuantScheme(3, -1),
    QuantScheme(8, 64, is_symmetric=True),
    QuantScheme(3, 16, format="mxint"),
    QuantScheme(4, 32, format="mxfp4"),
    QuantScheme(4, 32, format="nf4"),
]
DAMPING = 0.01
EPSILON = 1e-9


def correlated(num_channels: int, num_tokens: int = 500) -> Tensor:
    """Autocorrelation of inputs that share a few directions and differ in size by three orders of magnitude."""
    mixing = torch.randn(num_channels, num_channels, dtype=torch.float64) / num_channels**0.5
    mixing += torch.randn(num_channels, 4, dtype=torch.float64) @ torch.randn(4, num_channels, dtype=torch.float64)
    sizes = torch.logspace(-1.5, 1.5, num_channels, dtype=torch.float64)[torch.randperm(num_channels)]
    inputs = torch.randn(num_tokens, num_channels, dtype=torch.float64) @ mixing * sizes
    return inputs.T @ inputs / num_tokens


def damped(autocorrelation: Tensor, damping: float = DAMPING) -> Tensor:
    return autocorrelation + damping * autocorrelation.diagonal().mean() * torch.eye(
        len(autocorrelation), dtype=torch.float64
    )


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """``e H e^T`` of each row."""
    error = weight.double() - dequantize(quantized).double()
    return ((error @ hessian) * error).sum(1)


def gptq(
    weight: Tensor, scheme: QuantScheme, autocorrelation: Tensor, *, damping: float = DAMPING, **options: bool | int
) -> QuantizedWeight:
    use_act_order = bool(options.pop("use_act_order", False))
    return quantize_gptq(weight, scheme, factorize(autocorrelation, damping, use_act_order=use_act_order), **options)


def brain_surgery(weight: Tensor, scheme: QuantScheme, hessian: Tensor, order: list[int], *, moves: bool) -> Tensor:
    """Codes by the definition: round a column, move all that are left to the minimum of the loss, go on."""
    weight = weight.double().clone()
    length = scheme.group_length(weight.shape[1])
    scale, zero_point = choose_grid(weight.float(), scheme)
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    all_codes = torch.arange(2**scheme.num_bits, dtype=torch.uint8)
    allowed = all_codes[1:] if scheme.format == "mxint" else all_codes
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for position, column in enumerate(order):
        group = column // length
        if moves and column % length == 0:
            new = choose_grid(weight[:, column : column + length].float(), scheme)
            scale[:, group] = new[0][:, 0]
            zeros[:, group] = 0 if new[1] is None else new[1][:, 0]
        left = order[position:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        for row in range(len(weight)):
            zero = None if zero_point is None else zeros[row, group]
            values = decode(allowed, scale[row, group], zero, scheme).double()
            best = (values - weight[row, column]).abs().argmin()
            codes[row, column] = allowed[best]
            weight[row, left] -= (weight[row, column] - values[best]) / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("use_act_order", [False, True])
def test_codes_are_those_of_optimal_brain_quantization(scheme: QuantScheme, use_act_order: bool) -> None:
    weight, autocorrelation = torch.randn(5, 64), correlated(64)
    sizes = autocorrelation.diagonal()
    order = sorted(range(64), key=lambda channel: -float(sizes[channel])) if use_act_order else list(range(64))
    expected = brain_surgery(weight, scheme, damped(autocorrelation), order, moves=not use_act_order)
    quantized = gptq(weight, scheme, autocorrelation, use_act_order=use_act_order)
    assert torch.equal(dequantize(quantized), dequantize(QuantizedWeight(expected, *grids(quantized), scheme)))


def grids(quantized: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    return quantized.scale, quantized.zero_point


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_grid_of_the_first_group_spans_the_weight_itself(scheme: QuantScheme) -> None:
    weight = torch.randn(5, 64)
    quantized, spanning = gptq(weight, scheme, correlated(64)), quantize_rtn(weight, scheme)
    assert torch.equal(quantized.scale[:, 0], spanning.scale[:, 0])
    assert quantized.scale.dtype == spanning.scale.dtype
    assert quantized.scale.shape == spanning.scale.shape
    if spanning.zero_point is None:
        assert quantized.zero_point is None
    else:
        assert quantized.zero_point is not None
        assert torch.equal(quantized.zero_point[:, 0], spanning.zero_point[:, 0])
        assert quantized.zero_point.dtype == torch.uint8


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("use_act_order", [False, True])
def test_uncorrelated_channels_are_rounded_to_nearest(scheme: QuantScheme, use_act_order: bool) -> None:
    weight, autocorrelation = torch.randn(6, 128), torch.diag(torch.rand(128, dtype=torch.float64) + 0.01)
    quantized, rounded = (
        gptq(weight, scheme, autocorrelation, use_act_order=use_act_order),
        quantize_rtn(weight, scheme),
    )
    assert torch.equal(quantized.codes, rounded.codes)
    assert torch.equal(quantized.scale, rounded.scale)


@pytest.mark.parametrize("use_act_order", [False, True])
def test_the_factor_multiplies_back_to_the_damped_hessian(use_act_order: bool) -> None:
    autocorrelation = correlated(48)
    factor = factorize(autocorrelation, 0.1, use_act_order=use_act_order)
    triangle = factor.feedback.T.double()
    assert torch.equal(triangle.diagonal(), torch.ones(48, dtype=torch.float64))
    assert not triangle.tril(-1).any()
    restored = triangle @ torch.diag(factor.pivots) @ triangle.T
    expected = damped(autocorrelation, 0.1)[factor.order][:, factor.order]
    sizes = expected.diagonal().sqrt()
    assert ((restored - expected).abs() <= 1e-6 * torch.outer(sizes, sizes)).all()


def test_a_pivot_is_what_later_channels_cannot_make_up_for() -> None:
    autocorrelation = correlated(12)
    factor = factorize(autocorrelation, DAMPING, use_act_order=False)
    hessian = damped(autocorrelation)
    expected = torch.stack([1 / torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(12)])
    assert torch.allclose(factor.pivots, expected, rtol=EPSILON)


@pytest.mark.parametrize("scheme", [QuantScheme(4, -1), QuantScheme(3, -1, is_symmetric=True)], ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 64, 200])
def test_codes_do_not_depend_on_the_block_size(scheme: QuantScheme, block_size: int) -> None:
    weight, autocorrelation = torch.randn(8, 96), correlated(96)
    expected = gptq(weight, scheme, autocorrelation)
    assert torch.equal(gptq(weight, scheme, autocorrelation, block_size=block_size).codes, expected.codes)


def test_act_order_is_the_plain_order_of_permuted_channels() -> None:
    weight, autocorrelation, scheme = torch.randn(8, 64), correlated(64), QuantScheme(4, -1)
    order = autocorrelation.diagonal().argsort(descending=True)
    permuted = gptq(weight[:, order], scheme, autocorrelation[order][:, order])
    assert torch.equal(gptq(weight, scheme, autocorrelation, use_act_order=True).codes[:, order], permuted.codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("use_act_order", [False, True])
def test_the_output_error_is_well_below_that_of_rounding(scheme: QuantScheme, use_act_order: bool) -> None:
    weight, autocorrelation = torch.randn(32, 128), correlated(128)
    quantized = gptq(weight, scheme, autocorrelation, use_act_order=use_act_order)
    rounded = loss(weight, quantize_rtn(weight, scheme), autocorrelation).sum()
    assert loss(weight, quantized, autocorrelation).sum() < 0.6 * rounded


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("use_act_order", [False, True])
def test_clip_search_raises_the_loss_of_no_row(scheme: QuantScheme, use_act_order: bool) -> None:
    weight, autocorrelation = torch.randn(32, 128) * torch.rand(32, 128).pow(-0.3), correlated(128)
    factor, hessian = factorize(autocorrelation, DAMPING, use_act_order=use_act_order), damped(autocorrelation)
    plain = loss(weight, quantize_gptq(weight, scheme, factor), hessian)
    searched = loss(weight, quantize_gptq(weight, scheme, factor, use_clip_search=True), hessian)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.999 * plain.sum()


def test_rows_where_clip_search_loses_are_those_without_it() -> None:
    weight, autocorrelation = torch.randn(64, 64), correlated(64)
    factor, hessian, scheme = (
        factorize(autocorrelation, DAMPING, use_act_order=False),
        damped(autocorrelation),
        SCHEMES[1],
    )
    plain, searched = (quantize_gptq(weight, scheme, factor, use_clip_search=use) for use in (False, True))
    same = loss(weight, plain, hessian) <= loss(weight, searched, hessian) * (1 + EPSILON)
    assert 0 < int(same.sum()) < 64
    assert torch.equal(plain.codes[same], searched.codes[same])
    assert torch.equal(plain.scale[same], searched.scale[same])


@pytest.mark.parametrize("use_act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_dead_channel_becomes_zero_and_disturbs_no_other(scheme: QuantScheme, use_act_order: bool) -> None:
    weight, autocorrelation = torch.randn(6, 64), correlated(64)
    dead = torch.tensor([0, 17, 63])
    autocorrelation[dead] = 0
    autocorrelation[:, dead] = 0
    quantized = gptq(weight, scheme, autocorrelation, use_act_order=use_act_order)
    assert not dequantize(quantized)[:, dead].any()
    other = weight.clone()
    other[:, dead] = 1000.0
    again = gptq(other, scheme, autocorrelation, use_act_order=use_act_order, use_clip_search=False)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.scale, quantized.scale)


def test_inputs_that_are_all_zero_give_zero() -> None:
    for use_clip_search in (False, True):
        quantized = gptq(
            torch.randn(4, 64), SCHEMES[0], torch.zeros(64, 64, dtype=torch.float64), use_clip_search=use_clip_search
        )
        assert not dequantize(quantized).any()


@pytest.mark.parametrize("damping", [0.0, DAMPING, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_fewer_tokens_than_channels_are_enough(damping: float, num_tokens: int) -> None:
    weight, autocorrelation = torch.randn(16, 64), correlated(64, num_tokens)
    for use_act_order, use_clip_search in itertools.product((False, True), repeat=2):
        quantized = gptq(
            weight, SCHEMES[0], autocorrelation,
            damping=damping, use_act_order=use_act_order, use_clip_search=use_clip_search,
        )  # fmt: skip
        rounded = loss(weight, quantize_rtn(weight, SCHEMES[0]), autocorrelation).sum()
        assert loss(weight, quantized, autocorrelation).sum() < rounded


def test_a_hessian_that_is_not_positive_definite_gets_more_damping() -> None:
    hessian = torch.diag(torch.ones(4, dtype=torch.float64))
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = factorize(hessian, 0.01, use_act_order=False)
    assert torch.allclose(factor.pivots[2:], torch.full((2,), 1.1, dtype=torch.float64))


def test_no_damping_at_all_is_possible_where_the_hessian_allows_it() -> None:
    autocorrelation = correlated(16)
    factor = factorize(autocorrelation, 0.0, use_act_order=False)
    assert torch.allclose(factor.pivots[-1], autocorrelation[-1, -1], rtol=EPSILON)


def test_a_hessian_that_no_damping_mends_is_refused_with_advice() -> None:
    hessian = torch.full((64, 64), -1.0, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(CalibrationError, match=r"64 input channels is not positive definite.*at least 64 tokens"):
        factorize(hessian, DAMPING, use_act_order=False)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, autocorrelation = torch.randn(8, 64), correlated(64)
    autocorrelation[3] = autocorrelation[:, 3] = 0
    expected = gptq(weight, SCHEMES[0], autocorrelation, use_clip_search=True)
    assert torch.equal(gptq(weight, SCHEMES[0], autocorrelation * factor, use_clip_search=True).codes, expected.codes)


def test_every_row_is_quantized_as_if_it_were_alone() -> None:
    weight, autocorrelation = torch.randn(6, 64), correlated(64)
    together = gptq(weight, SCHEMES[0], autocorrelation, use_clip_search=True)
    for row in range(6):
        alone = gptq(weight[row : row + 1], SCHEMES[0], autocorrelation, use_clip_search=True)
        assert torch.equal(alone.codes[0], together.codes[row])


def test_quantizing_is_deterministic_and_leaves_its_inputs_alone() -> None:
    weight, autocorrelation = torch.randn(8, 64), correlated(64)
    copies = weight.clone(), autocorrelation.clone()
    first, second = (gptq(weight, SCHEMES[0], autocorrelation, use_clip_search=True) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(weight, copies[0])
    assert torch.equal(autocorrelation, copies[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_give_what_their_float32_value_gives(dtype: torch.dtype) -> None:
    weight, autocorrelation = torch.randn(4, 64).to(dtype), correlated(64)
    expected = gptq(weight.float(), SCHEMES[0], autocorrelation)
    assert torch.equal(gptq(weight, SCHEMES[0], autocorrelation).codes, expected.codes)


def test_a_weight_of_another_width_than_the_statistics_is_refused() -> None:
    with pytest.raises(CalibrationError, match="autocorrelation is of 64 input channels, the weight has 128"):
        gptq(torch.randn(4, 128), SCHEMES[0], correlated(64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 33] = value
    with pytest.raises(SchemeError, match=r"\(4, 64\) holds (nan|inf) at row 2, column 33"):
        gptq(weight, SCHEMES[0], correlated(64))


def test_groups_that_do_not_tile_the_rows_are_refused() -> None:
    with pytest.raises(SchemeError, match="group_size 64 does not divide its 96 input channels"):
        gptq(torch.randn(4, 96), QuantScheme(4, 64), correlated(96))
