"""Clip search, against rounding to nearest and against trying every grid there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import SchemeError
from models.quant import clip
from models.quant.clip import search_grid
from models.quant.grid import choose_grid, decode, dequantize, encode, quantize
from models.scheme import QuantScheme

SCHEMES = [
    *(QuantScheme(num_bits, 32, is_symmetric) for num_bits in range(2, 9) for is_symmetric in (False, True)),
    QuantScheme(4, -1),
    QuantScheme(3, -1, is_symmetric=True),
    *(QuantScheme(num_bits, 16, format="mxint") for num_bits in (2, 4, 8)),
    QuantScheme(3, 32, format="mxint", exponent="ceil"),
    QuantScheme(4, 32, format="mxfp4"),
    QuantScheme(4, 32, format="nf4"),
]
FORMATS = [SCHEMES[4], SCHEMES[5], *SCHEMES[14:]]
EXPONENTS = torch.tensor([-2, -1, 0, 1])


def with_outliers(num_rows: int, num_columns: int) -> Tensor:
    return torch.randn(num_rows, num_columns) * torch.rand(num_rows, num_columns).clamp(min=0.02).pow(-0.5)


def group_losses(
    weight: Tensor, scheme: QuantScheme, mean_square: Tensor, grid: tuple[Tensor, Tensor | None]
) -> Tensor:
    """(out_features, num_groups) float64."""
    error = weight.double() - dequantize(quantize(weight, *grid, scheme)).double()
    return (error.square() * mean_square).reshape(len(weight), grid[0].shape[1], -1).sum(-1)


def least_loss(values: Tensor, scheme: QuantScheme, mean_square: Tensor, scales: Tensor) -> float:
    """Of one group, over all of ``scales`` and all zero points."""
    zeros = [None] if scheme.is_symmetric else [torch.tensor(float(code)) for code in range(scheme.max_code + 1)]
    losses = []
    for zero in zeros:
        restored = decode(encode(values, scales[:, None], zero, scheme), scales[:, None], zero, scheme)
        losses.append(((restored - values).double().square() * mean_square).sum(-1).min())
    return float(min(losses))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_group_is_worse_than_on_the_grid_that_spans_it(scheme: QuantScheme) -> None:
    weight, mean_square = with_outliers(16, 128), torch.rand(128, dtype=torch.float64) ** 4
    spanning = group_losses(weight, scheme, mean_square, choose_grid(weight, scheme))
    searched = group_losses(weight, scheme, mean_square, search_grid(weight, scheme, mean_square))
    assert (searched <= spanning * (1 + 1e-5)).all()
    assert searched.sum() < 0.98 * spanning.sum()


@given(
    st.sampled_from(FORMATS),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64),
    st.lists(st.floats(0, 1e6), min_size=64, max_size=64),
)
@settings(max_examples=80, deadline=None)
def test_whatever_the_group_holds_the_grid_is_valid_and_no_worse(
    scheme: QuantScheme, values: list[float], squares: list[float]
) -> None:
    weight, mean_square = torch.tensor([values]), torch.tensor(squares, dtype=torch.float64)
    scale, zero_point = search_grid(weight, scheme, mean_square)
    spanning = choose_grid(weight, scheme)
    assert scale.dtype == spanning[0].dtype
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (zero_point is None) == scheme.is_symmetric
    before = group_losses(weight, scheme, mean_square, spanning)
    after = group_losses(weight, scheme, mean_square, (scale, zero_point))
    tiny = 1e-30 * mean_square.max()  # squares that vanish in float32 are nobody's loss
    assert (after <= before * (1 + 1e-5) + tiny).all()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.has_exponent_scale and s.num_bits <= 4], ids=str)
def test_the_grid_is_nearly_the_best_that_exists(scheme: QuantScheme) -> None:
    ratios = []
    for _ in range(9):
        weight, mean_square = with_outliers(1, 32), torch.rand(32, dtype=torch.float64)
        found = group_losses(weight, scheme, mean_square, search_grid(weight, scheme, mean_square))
        scales = (torch.arange(1, 1001) / 1000 * weight.abs().max()).half().float()
        ratios.append(float(found) / least_loss(weight[0], scheme, mean_square, scales))
    assert sorted(ratios)[4] < 1.02
    assert max(ratios) < 1.6


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.has_exponent_scale], ids=str)
def test_the_exponent_is_the_best_of_its_neighbours(scheme: QuantScheme) -> None:
    weight, mean_square = with_outliers(8, 64), torch.rand(64, dtype=torch.float64)
    spanning, _ = choose_grid(weight, scheme)
    found = group_losses(weight, scheme, mean_square, search_grid(weight, scheme, mean_square))
    length = scheme.group_size
    for row, group in torch.cartesian_prod(torch.arange(8), torch.arange(64 // length)).tolist():
        columns = slice(group * length, (group + 1) * length)
        candidates = spanning[row, group].float() * 2.0**EXPONENTS
        best = least_loss(weight[row, columns], scheme, mean_square[columns], candidates)
        assert float(found[row, group]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("scheme", [s for s in FORMATS if s.num_bits > 2], ids=str)
def test_an_outlier_is_clipped_unless_its_channel_carries_the_output(scheme: QuantScheme) -> None:
    weight = torch.randn(4, 32).clamp(-2, 2)
    weight[:, 5] = 20.0
    mean_square = torch.ones(32, dtype=torch.float64)
    mean_square[5] = 1e-6
    spared = dequantize(quantize(weight, *search_grid(weight, scheme, mean_square), scheme))
    mean_square[5] = 1e6
    kept = dequantize(quantize(weight, *search_grid(weight, scheme, mean_square), scheme))
    others = [column for column in range(32) if column != 5]
    assert (spared[:, 5] < 16).all()
    assert ((kept[:, 5] - 20).abs() < (spared[:, 5] - 20).abs()).all()
    assert (spared - weight)[:, others].norm() < (kept - weight)[:, others].norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_without_inputs_keeps_the_grid_that_spans_it(scheme: QuantScheme) -> None:
    weight = with_outliers(4, 64)
    scale, zero_point = search_grid(weight, scheme, torch.zeros(64, dtype=torch.float64))
    spanning = choose_grid(weight, scheme)
    assert torch.equal(scale, spanning[0])
    assert zero_point is None or torch.equal(zero_point, spanning[1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_on_a_grid_stays_as_it_is(scheme: QuantScheme) -> None:
    weight = dequantize(quantize(torch.randn(4, 64), *choose_grid(torch.randn(4, 64), scheme), scheme))
    for _ in range(4):  # rounding to nearest may need a few rounds to come to rest
        weight = dequantize(quantize(weight, *choose_grid(weight, scheme), scheme))
    grid = choose_grid(weight, scheme)
    if torch.equal(dequantize(quantize(weight, *grid, scheme)), weight):
        searched = search_grid(weight, scheme, torch.rand(64, dtype=torch.float64))
        assert torch.equal(dequantize(quantize(weight, *searched, scheme)), weight)


def test_zeros_stay_zeros() -> None:
    for scheme in SCHEMES:
        grid = search_grid(torch.zeros(2, 64), scheme, torch.ones(64, dtype=torch.float64))
        assert not dequantize(quantize(torch.zeros(2, 64), *grid, scheme)).any()


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_rows_are_searched_as_if_each_were_alone(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mean_square = with_outliers(7, 64), torch.rand(64, dtype=torch.float64)
    together = search_grid(weight, scheme, mean_square)
    monkeypatch.setattr(clip, "_VALUES_AT_ONCE", 3 * 64)
    in_threes = search_grid(weight, scheme, mean_square)
    alone = [search_grid(row[None], scheme, mean_square) for row in weight]
    assert torch.equal(in_threes[0], together[0])
    assert torch.equal(torch.cat([scale for scale, _ in alone]), together[0])
    if together[1] is not None:
        assert in_threes[1] is not None
        assert torch.equal(in_threes[1], together[1])


def test_only_the_ratios_of_the_mean_squares_matter() -> None:
    weight, mean_square = with_outliers(4, 64), torch.rand(64, dtype=torch.float64)
    expected, _ = search_grid(weight, SCHEMES[4], mean_square)
    for factor in (2.0**-80, 2.0**80):
        assert torch.equal(search_grid(weight, SCHEMES[4], mean_square * factor)[0], expected)


def test_searching_is_deterministic_and_leaves_its_inputs_alone() -> None:
    weight, mean_square = with_outliers(4, 64), torch.rand(64, dtype=torch.float64)
    copies = weight.clone(), mean_square.clone()
    first, second = (search_grid(weight, SCHEMES[4], mean_square)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(weight, copies[0])
    assert torch.equal(mean_square, copies[1])


@pytest.mark.parametrize("size", [1e-40, 1e-9, 3e-7, 5e-5, 2e4])
def test_extreme_weights_keep_a_valid_scale(size: float) -> None:
    for scheme in FORMATS:
        weight, mean_square = torch.randn(4, 64).clamp(-3, 3) * size, torch.rand(64, dtype=torch.float64)
        scale, _ = search_grid(weight, scheme, mean_square)
        assert scale.isfinite().all()
        assert (scale > 0).all()


def test_a_weight_that_is_not_finite_is_refused_with_its_place() -> None:
    weight = torch.randn(4, 64)
    weight[2, 33] = float("nan")
    with pytest.raises(SchemeError, match="holds nan at row 2, column 33"):
        search_grid(weight, SCHEMES[4], torch.ones(64, dtype=torch.float64))
