"""Merges of low-rank integers into codes, against exact fractions and loops over Python's integers."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.errors import SchemeError
from models.quant.gptq import factorize, quantize_gptq
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.reconstruct.merge import (
    SWITCHED_OFF,
    IntegerBase,
    check_exact,
    clamp_codes,
    exact_product,
    fixed_point_merge,
    integer_base,
    round_shift,
    shift_merge,
    ternary_merge,
)
from models.scheme import QuantScheme
from models.train.initial import positions
from tests.support.qer_cases import (
    HALF,
    SCHEMES,
    clamped,
    each,
    fixed_point,
    input_statistics,
    off_grid_layer,
    shifted,
    ternary,
)

PRODUCTS = st.integers(-(2**24) + 1, 2**24 - 1) | st.integers(-20, 20)
SHIFTS = st.integers(0, SWITCHED_OFF)


@st.composite
def merges(draw: st.DrawFn) -> tuple[IntegerBase, Tensor]:
    """A base of 2 x 3 weights with any codes and fractions, and products."""
    num_bits, bits = draw(st.sampled_from((2, 3, 4, 8))), draw(st.integers(1, 8))

    def matrix(values: st.SearchStrategy[int]) -> Tensor:
        rows = draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=2))
        return torch.tensor(rows, dtype=torch.int32)

    codes = matrix(st.integers(0, 2**num_bits - 1))
    fraction = matrix(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return IntegerBase(codes, fraction, bits, 2**num_bits - 1), matrix(PRODUCTS)


@given(values=st.lists(st.integers(-(2**30) + 1, 2**30 - 1) | PRODUCTS, min_size=1), shift=SHIFTS)
def test_a_rounding_shift_is_the_nearest_integer_with_halves_upwards(values: list[int], shift: int) -> None:
    tensor = torch.tensor(values, dtype=torch.int32)
    wanted = [shifted(value, shift) for value in values]
    assert round_shift(tensor, shift).dtype == torch.int32
    assert round_shift(tensor, shift).tolist() == wanted
    assert round_shift(tensor, torch.full_like(tensor, shift)).dtype == torch.int32
    assert round_shift(tensor, torch.full_like(tensor, shift)).tolist() == wanted


@given(values=st.lists(st.integers(-(2**22) + 1, 2**22 - 1), min_size=1), shift=st.integers(-8, -1))
def test_a_negative_shift_multiplies(values: list[int], shift: int) -> None:
    tensor = torch.tensor(values, dtype=torch.int32)
    assert round_shift(tensor, shift).tolist() == [value * 2**-shift for value in values]


@given(value=PRODUCTS, shift=st.integers(0, 30))
def test_the_shift_is_the_floor_of_float64_division_plus_a_half(value: int, shift: int) -> None:
    assert round_shift(torch.tensor([value], dtype=torch.int32), shift).tolist() == [math.floor(value / 2**shift + 0.5)]


@pytest.mark.parametrize("shift", range(1, 7))
def test_rounding_halves_to_even_would_be_another_function(shift: int) -> None:
    values = torch.arange(-256, 257, dtype=torch.int32)
    ours, to_even = round_shift(values, shift), (values / 2**shift).round().int()
    is_half_above_even = torch.tensor([Fraction(v, 2**shift) % 2 == HALF for v in values.tolist()])
    assert is_half_above_even.any()
    assert torch.equal(ours != to_even, is_half_above_even)
    assert torch.equal((ours - to_even)[is_half_above_even], torch.ones_like(ours)[is_half_above_even])


def test_negative_odd_products_round_towards_plus_infinity_at_halves() -> None:
    values = torch.tensor([-1, -3, -5, -7, 1, 3], dtype=torch.int32)
    assert round_shift(values, 1).tolist() == [0, -1, -2, -3, 1, 2]


@given(case=merges(), shift=SHIFTS)
def test_the_fixed_point_merge_is_its_definition(case: tuple[IntegerBase, Tensor], shift: int) -> None:
    base, product = case
    if shift < base.fraction_bits:
        product = product.clamp(-(2**20), 2**20)  # check_exact keeps more out
    assert base.fraction is not None
    found = fixed_point_merge(base, product, shift)
    assert found.dtype == torch.int32
    wanted = each(partial(fixed_point, shift=shift, bits=base.fraction_bits), base.codes, base.fraction, product)
    assert found.tolist() == wanted
    codes = clamp_codes(found, base)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == each(lambda v: clamped(v, base.max_code.bit_length()), wanted)


@given(case=merges(), shifts=st.lists(SHIFTS, min_size=2, max_size=2))
def test_the_shift_merge_has_a_shift_per_output_channel(case: tuple[IntegerBase, Tensor], shifts: list[int]) -> None:
    base, product = case
    column = torch.tensor(shifts, dtype=torch.int32)[:, None]
    wanted = each(lambda code, p, t: code + shifted(p, t), base.codes, product, column)
    assert shift_merge(base, product, column).tolist() == wanted
    for row, shift in enumerate(shifts):
        assert shift_merge(base, product, shift)[row].tolist() == wanted[row]
    assert shift_merge(base, product, 0).tolist() == each(lambda code, p: code + p, base.codes, product)


@given(case=merges(), rank=st.integers(1, 64), share=st.sampled_from((0.25, 0.5, 0.75, 0.9375)))
def test_the_ternary_merge_steps_where_the_product_is_above_its_threshold(
    case: tuple[IntegerBase, Tensor], rank: int, share: float
) -> None:
    base, product = case
    product = product.clamp(-rank, rank)
    found = ternary_merge(base, product, share * rank)
    assert found.dtype == torch.int32
    assert found.tolist() == each(partial(ternary, threshold=Fraction(share) * rank), base.codes, product)


def test_a_product_at_the_threshold_is_no_step() -> None:
    base = IntegerBase(torch.full((1, 4), 7, dtype=torch.int32), None, 0, 15)
    product = torch.tensor([[3, -3, 4, -4]], dtype=torch.int32)
    assert ternary_merge(base, product, 0.75 * 4).tolist() == [[7, 7, 8, 6]]


@given(case=merges(), shift=SHIFTS)
def test_products_of_nothing_and_channels_that_are_off_leave_the_base(
    case: tuple[IntegerBase, Tensor], shift: int
) -> None:
    base, product = case
    nothing = torch.zeros_like(product)
    off = torch.full((2, 1), SWITCHED_OFF, dtype=torch.int32)
    for values in (
        fixed_point_merge(base, nothing, shift),
        fixed_point_merge(base, product, SWITCHED_OFF),
        shift_merge(base, nothing, shift),
        shift_merge(base, product, SWITCHED_OFF),
        shift_merge(base, product, off),
        ternary_merge(base, nothing, 0.5),
    ):
        assert torch.equal(values, base.codes)
        assert torch.equal(clamp_codes(values, base).int(), base.codes)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_codes_saturate_at_both_ends(num_bits: int) -> None:
    most = 2**num_bits - 1
    base = integer_base(
        torch.tensor([[0, most, 1, most - 1]], dtype=torch.uint8), torch.tensor([[0.2, most, 1, most]]), 4, most
    )
    product = torch.tensor([[-1000, 1000, -(2**20), 2**20]], dtype=torch.int32)
    for values in (fixed_point_merge(base, product, 4), shift_merge(base, product, 0)):
        assert clamp_codes(values, base).tolist() == [[0, most, 0, most]]
    inwards = clamp_codes(ternary_merge(base, -product.sign(), 0.5), base)
    assert inwards.tolist() == [[1, most - 1, 2, most - 2]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_base_keeps_the_nearest_fraction_that_starts_at_the_codes(scheme: QuantScheme, bits: int) -> None:
    weight, quantized = off_grid_layer(scheme)
    position = positions(weight, quantized)
    base = integer_base(quantized.codes, position, bits, scheme.max_code)
    assert base.fraction is not None and base.fraction.dtype == torch.int32
    half = 2 ** (bits - 1)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            missed = Fraction(float(position[row, column])) - int(quantized.codes[row, column])
            wanted = min(max(math.floor(missed * 2**bits + HALF), -half), half - 1)
            assert int(base.fraction[row, column]) == wanted
    assert torch.equal(fixed_point_merge(base, torch.zeros_like(base.codes), 7), quantized.codes.int())
    assert integer_base(quantized.codes, position, 0, scheme.max_code).fraction is None


def test_codes_of_gptq_and_weights_beyond_the_grid_start_as_they_are() -> None:
    weight = torch.randn(16, 64) * 0.05
    autocorrelation = input_statistics(64).autocorrelation
    assert autocorrelation is not None
    quantized = quantize_gptq(weight, QuantScheme(3, 32), factorize(autocorrelation, 0.01, use_act_order=False))
    position = positions(weight, quantized)
    missed = position - quantized.codes
    assert float(missed.abs().max()) > 0.75  # GPTQ chose another code than the nearest
    assert bool(((position > 7.5) | (position < -0.5)).any())
    for bits in range(1, 9):
        base = integer_base(quantized.codes, position, bits, 7)
        for shift in range(SWITCHED_OFF + 1):
            assert torch.equal(fixed_point_merge(base, torch.zeros_like(base.codes), shift), quantized.codes.int())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_positions_are_where_the_weight_lies_on_its_grid(scheme: QuantScheme) -> None:
    weight, quantized = off_grid_layer(scheme)
    length = scheme.group_length(64)
    level = quantized.scale.double().repeat_interleave(length, 1)
    missed = (weight.double() - dequantize(quantized).double()) / level
    assert torch.allclose(positions(weight, quantized) - quantized.codes, missed, rtol=0, atol=1e-12)
    nearest = quantize_rtn(weight, scheme)
    assert float((positions(weight, nearest) - nearest.codes).abs().max()) <= (0.51 if scheme.is_symmetric else 1.01)


@pytest.mark.parametrize(("rank", "largest"), [(1040, 127), (268, 250), (64, 127), (16, 7), (3, 1)])
def test_products_are_exact_up_to_the_largest_that_is_allowed(rank: int, largest: int) -> None:
    check_exact(rank, largest, "a layer")
    rows = torch.randint(-largest, largest + 1, (6, rank))
    rows[0], rows[1], rows[2] = largest, -largest, torch.where(torch.arange(rank) % 2 == 0, largest, -largest)
    rows[3] = largest - (torch.arange(rank) == 0).long()
    found = exact_product(rows.float(), rows.T.float())
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), rows @ rows.T)
    assert int(found.max()) == rank * largest**2


@pytest.mark.parametrize(("rank", "largest"), [(1041, 127), (2**24, 1), (16, 1024)])
def test_products_that_float32_may_round_are_refused_by_layer(rank: int, largest: int) -> None:
    with pytest.raises(SchemeError, match=rf"layers\.3\.q: products of rank {rank} .* {largest} reach .* 16777216"):
        check_exact(rank, largest, "layers.3.q")


def test_products_that_leave_int32_on_the_way_are_refused_by_layer() -> None:
    check_exact(64, 127, "layers.3.q", left_shift=8)
    with pytest.raises(SchemeError, match=r"layers\.3\.q: products of rank 1040 .*, shifted left by 8, leave int32"):
        check_exact(1040, 127, "layers.3.q", left_shift=8)
