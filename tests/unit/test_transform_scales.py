"""Flattening scales, orders and folds against their definitions, value by value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import CalibrationError
from models.transform.flatten import NEGLIGIBLE, column_absmax, flatten_scale, share_over_query_heads
from models.transform.fold import divide_rows, scale_columns
from models.transform.permute import descending_order

magnitude = st.floats(0.01, 100)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(magnitude, magnitude), min_size=1, max_size=8), st.floats(0, 1))
def test_scale_is_the_quotient_of_powers(channels: list[tuple[float, float]], alpha: float) -> None:
    absmax, weights = (torch.tensor(values, dtype=torch.float64) for values in zip(*channels, strict=True))
    scale = flatten_scale(absmax, weights, alpha, "layer")
    assert scale.dtype == torch.float64
    expected = [math.pow(a, alpha) / math.pow(w, 1 - alpha) for a, w in channels]
    assert scale.tolist() == pytest.approx(expected, rel=1e-12)


def test_alpha_one_is_the_activations_alone() -> None:
    absmax = torch.tensor([3.0, 0.5, 7.0])
    assert torch.equal(flatten_scale(absmax, torch.tensor([0.0, 2.0, 9.0]), 1.0, "layer"), absmax.double())


def test_alpha_one_half_makes_activations_and_weights_equally_large() -> None:
    absmax, weights = torch.tensor([3.0, 0.5, 7.0]), torch.tensor([0.2, 2.0, 9.0])
    scale = flatten_scale(absmax, weights, 0.5, "layer")
    assert torch.allclose(absmax / scale, weights * scale)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dead", [0.0, 1e-30, 0.4 * NEGLIGIBLE])
def test_channel_that_is_hardly_ever_active_is_taken_for_a_typical_one(alpha: float, dead: float) -> None:
    absmax = torch.tensor([dead, 0.5, 1.0, 200.0])
    scale = flatten_scale(absmax, torch.ones(4), alpha, "layer")
    assert torch.allclose(scale[1:], absmax[1:].double() ** alpha)
    assert scale[0] == scale[1:].median()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_scales_do_not_depend_on_the_unit_of_the_activations(unit: float) -> None:
    absmax, weights = torch.tensor([0.0, 1e-7, 0.5, 1.0, 3.0]).double(), torch.rand(5).double() + 0.1
    scale = flatten_scale(absmax, weights, 1.0, "layer")
    assert torch.allclose(flatten_scale(absmax * unit, weights, 1.0, "layer"), scale * unit)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_layers_and_columns_of_zeros_give_finite_positive_scales(alpha: float) -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert flatten_scale(zeros, ones, alpha, "layer").tolist() == [1.0, 1.0, 1.0]
    for weights in (zeros, torch.tensor([0.0, 2.0, 5.0])):
        scale = flatten_scale(ones, weights, alpha, "layer")
        assert (scale.isfinite() & (scale > 0)).all()
    assert flatten_scale(ones, torch.tensor([0.0, 2.0, 5.0]), 0.0, "layer")[0] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_magnitudes_that_cannot_be_are_refused_with_the_layer(bad: float) -> None:
    good, broken = torch.ones(2), torch.tensor([1.0, bad])
    with pytest.raises(CalibrationError, match=r"^layers\.3\.down_proj: the largest activations"):
        flatten_scale(broken, good, 1.0, "layers.3.down_proj")
    with pytest.raises(CalibrationError, match=r"^layers\.3\.down_proj: the largest weights"):
        flatten_scale(good, broken, 1.0, "layers.3.down_proj")


def test_column_absmax_is_the_largest_over_all_weights_with_one_input() -> None:
    weights = [torch.randn(3, 4), torch.randn(5, 4).bfloat16()]
    expected = [
        max(abs(float(weight[row, column])) for weight in weights for row in range(len(weight))) for column in range(4)
    ]
    assert column_absmax(weights).tolist() == expected
    assert column_absmax(weights).dtype == torch.float32


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_query_heads_of_one_value_head_share_their_largest(num_heads: int, num_kv_heads: int) -> None:
    head_dim, group = 4, num_heads // num_kv_heads
    values = torch.rand(num_heads * head_dim)
    shared = share_over_query_heads(values, num_kv_heads, head_dim)
    for head in range(num_heads):
        for channel in range(head_dim):
            siblings = [h for h in range(num_heads) if h // group == head // group]
            assert shared[head * head_dim + channel] == max(values[h * head_dim + channel] for h in siblings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_folds_multiply_columns_and_divide_rows_in_float32_or_wider(dtype: torch.dtype) -> None:
    weight, columns, rows = torch.randn(3, 4).to(dtype), torch.rand(4) + 0.1, torch.rand(3).double() + 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product, quotient, bias = scale_columns(weight, columns), divide_rows(weight, rows), divide_rows(weight[:, 0], rows)
    assert product.dtype == quotient.dtype == bias.dtype == wide
    for row in range(3):
        for column in range(4):
            stored = float(weight[row, column])
            assert float(product[row, column]) == pytest.approx(stored * float(columns[column]), rel=1e-6)
            assert float(quotient[row, column]) == pytest.approx(stored / float(rows[row]), rel=1e-6)
    assert torch.equal(bias, quotient[:, 0])


def test_order_puts_the_largest_first_and_keeps_equal_ones_as_they_come() -> None:
    statistic = torch.tensor([1.0, 5.0, 1.0, 7.0, 0.0, 5.0])
    order = descending_order(statistic, "layer")
    assert order.tolist() == [3, 1, 5, 0, 2, 4]
    assert order.dtype == torch.int32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_order_is_that_of_a_stable_sort(values: list[int]) -> None:
    order = descending_order(torch.tensor(values, dtype=torch.float64), "layer")
    assert order.tolist() == sorted(range(len(values)), key=lambda channel: -values[channel])


@pytest.mark.parametrize("statistic", [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])])
def test_order_of_what_is_not_finite_is_refused_with_the_layer(statistic: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"^layers\.3\.down_proj: .* not finite"):
        descending_order(statistic, "layers.3.down_proj")
