"""Codes in training: what the forward gives is what ships, and gradients are those of the smooth stand-in."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.reconstruct.merge import IntegerBase, integer_base
from models.train.codes import InsideRounding, IntegerFactors, Penalties
from models.train.initial import positions
from tests.support.qer_cases import (
    OFF,
    SCHEMES,
    clamped,
    each,
    fixed_point,
    off_grid_layer,
    product_of,
    qer,
    shifted,
    ternary,
    whole,
)

INTEGER = ["fixed-point", "shift", "direct", "ternary"]
RANK = 5
THRESHOLD = 0.25


def base_of(merge: str, scheme_index: int = 0) -> IntegerBase:
    scheme = SCHEMES[scheme_index]
    weight, quantized = off_grid_layer(scheme, (6, 32))
    bits = 4 if merge in {"fixed-point", "inside-rounding"} else 0
    return integer_base(quantized.codes, positions(weight, quantized), bits, scheme.max_code)


def integer_factors(merge: str, reach: float = 1.3, shift: int = 5, scheme_index: int = 0) -> IntegerFactors:
    """Latents up to ``reach`` times the largest integer, those beyond it included; one output channel in three off."""
    base = base_of(merge, scheme_index)
    options = qer(merge, RANK, threshold=THRESHOLD).options
    largest = options.largest_factor(base.max_code.bit_length())
    up, down = (torch.rand(shape) * 2 - 1 for shape in ((6, RANK), (RANK, 32)))
    shifts = torch.full((6, 1), 0 if merge == "direct" else shift)
    shifts[::3] = OFF
    return IntegerFactors(base, options, up * reach * largest, down * reach * largest, shift=shifts, largest=largest)


def integers_of(latents: Tensor, largest: int) -> list[list[int]]:
    """Rounded within ``-largest .. largest``, one at a time."""
    return [[round(min(max(value, -largest), largest)) for value in row] for row in latents.tolist()]


def values_by_definition(merge: str, factors: IntegerFactors) -> list[list[int]]:
    """V in Python's integers, from the latents."""
    base = factors.base
    largest = qer(merge).options.largest_factor(base.max_code.bit_length())
    product = product_of(integers_of(factors.lora_up.detach(), largest), integers_of(factors.lora_down, largest))
    if merge == "ternary":
        return each(partial(ternary, threshold=Fraction(THRESHOLD) * RANK), base.codes, product)
    if base.fraction is not None:
        merged = partial(fixed_point, bits=base.fraction_bits)
        return each(merged, base.codes, base.fraction, product, factors.shift)
    return each(lambda code, p, t: code + shifted(p, t), base.codes, product, factors.shift)


@pytest.mark.parametrize("merge", INTEGER)
@given(
    seed=st.integers(0, 2**31),
    reach=st.sampled_from((0.1, 0.6, 1.0, 3.0, 100.0)),
    shift=st.integers(0, 9),
    scheme_index=st.integers(0, len(SCHEMES) - 1),
)
def test_codes_of_the_forward_are_the_merged_ones_and_those_of_the_definition(
    merge: str, seed: int, reach: float, shift: int, scheme_index: int
) -> None:
    torch.manual_seed(seed)
    factors = integer_factors(merge, reach, shift, scheme_index)
    codes, penalties = whole(factors)
    merged, num_bits = factors.merged(), factors.base.max_code.bit_length()
    assert (codes.dtype, merged.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(codes, merged.float())
    values = values_by_definition(merge, factors)
    assert factors.values().tolist() == values
    assert merged.tolist() == each(lambda v: clamped(v, num_bits), values)
    assert penalties.overflow is not None
    assert penalties.overflow.tolist() == each(lambda v: v - clamped(v, num_bits), values)


@pytest.mark.parametrize("merge", INTEGER)
def test_the_cases_above_saturate_at_both_ends_and_have_channels_that_are_off(merge: str) -> None:
    factors = integer_factors(merge, 100.0, 1)
    values, codes = factors.values(), factors.merged()
    assert int(values.min()) < 0 and int(values.max()) > 15
    assert int(codes.min()) == 0 and int(codes.max()) == 15
    if merge != "ternary":
        assert torch.equal(codes[::3].int(), factors.base.codes[::3])


@pytest.mark.parametrize("merge", INTEGER)
def test_lower_precision_around_the_module_changes_no_integer(merge: str) -> None:
    factors = integer_factors(merge, 3.0, shift=6, scheme_index=4)
    values, codes = factors.values(), factors.merged()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factors.values(), values)
        assert torch.equal(factors.merged(), codes)
        assert torch.equal(whole(factors)[0], codes.float())


@given(seed=st.integers(0, 2**31), reach=st.sampled_from((0, 1, 20)), scheme_index=st.integers(0, len(SCHEMES) - 1))
def test_float_factors_inside_the_rounding_are_merged_as_they_are_trained(
    seed: int, reach: int, scheme_index: int
) -> None:
    torch.manual_seed(seed)
    base = base_of("inside-rounding", scheme_index)
    up, down = torch.randint(-8 * reach, 8 * reach + 1, (6, RANK)) / 8, torch.randint(-8, 9, (RANK, 32)) / 8
    inside = InsideRounding(base, up, down)
    codes, penalties = whole(inside)
    assert torch.equal(codes, inside.merged().float())
    assert base.fraction is not None
    position = base.codes.double() + base.fraction.double() / 2**base.fraction_bits + up.double() @ down.double() / RANK
    wanted = [[math.floor(value + 0.5) for value in row] for row in position.tolist()]
    assert inside.values().tolist() == wanted
    assert penalties.rounding is None and penalties.overflow is not None
    assert torch.equal(penalties.overflow + codes, torch.tensor(wanted).float())
    if reach == 0:
        assert torch.equal(inside.merged().int(), base.codes)


Loss = Callable[[Tensor, Penalties], Tensor]


def gradients(factors: IntegerFactors | InsideRounding, loss: Loss) -> tuple[Tensor, Tensor]:
    up, down = torch.autograd.grad(loss(*whole(factors)), (factors.lora_up, factors.lora_down))
    return up.double(), down.double()


def of_overflow(penalties: Penalties) -> Tensor:
    assert penalties.overflow is not None
    return penalties.overflow


def of_rounding(penalties: Penalties) -> Tensor:
    assert penalties.rounding is not None
    return penalties.rounding


def slope_of(merge: str, shift: Tensor) -> Tensor:
    """Levels per step of the product."""
    if merge == "ternary":
        return torch.full(shift.shape, 1 / (THRESHOLD * RANK), dtype=torch.float64)
    return torch.tensor([[0.0 if t >= OFF else 2.0**-t] for (t,) in shift.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("merge", INTEGER)
@pytest.mark.parametrize("reach", [0.5, 1.3])
def test_gradients_are_those_of_the_smooth_merge_inside_the_clamp_and_of_the_overflow_outside(
    merge: str, reach: float
) -> None:
    factors = integer_factors(merge, reach, 3)
    largest = qer(merge).options.largest_factor(4)
    up, down = factors.lora_up.detach(), factors.lora_down.detach()
    a, b = (torch.tensor(integers_of(latents, largest)).double() for latents in (up, down))
    values, slope = factors.values(), slope_of(merge, factors.shift)
    is_inside = (values >= 0) & (values <= 15)
    assert is_inside.any() and (merge == "ternary" or reach < 1 or not is_inside.all())
    direction = torch.randn(6, 32)
    losses: list[tuple[Loss, Tensor]] = [
        (lambda codes, _: (codes * direction).sum(), is_inside),
        (lambda _, penalties: (of_overflow(penalties) * direction).sum(), ~is_inside),
    ]
    for loss, passes in losses:
        moved = direction.double() * slope * passes
        wanted = moved @ b.T * (up.abs() <= largest), a.T @ moved * (down.abs() <= largest)
        for found, expected in zip(gradients(factors, loss), wanted, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    if reach > 1:
        assert (up.abs() > largest).any() and (down.abs() > largest).any()


@pytest.mark.parametrize("merge", INTEGER)
def test_the_rounding_penalty_pulls_latents_to_the_integers_they_stand_for(merge: str) -> None:
    factors = integer_factors(merge, 1.3, 3)
    largest = qer(merge).options.largest_factor(4)
    up, down = factors.lora_up.detach().double(), factors.lora_down.detach().double()
    a, b = (torch.tensor(integers_of(latents, largest)).double() for latents in (up, down))
    slope = slope_of(merge, factors.shift)
    lost = (a @ b - up @ down) * slope
    assert torch.allclose(of_rounding(whole(factors)[1]).double(), lost, rtol=0, atol=1e-3)
    moved = 2 * lost * slope
    # The integers are what the latents are drawn to: they hold still, also for latents beyond their range.
    wanted = -moved @ down.T, -up.T @ moved
    for found, expected in zip(gradients(factors, lambda _, p: of_rounding(p).square().sum()), wanted, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_overflow_penalty_brings_codes_back_from_beyond_both_ends() -> None:
    base = IntegerBase(torch.tensor([[15, 0]], dtype=torch.int32), None, 0, 15)
    options = qer("shift", 1).options
    factors = IntegerFactors(
        base, options, torch.tensor([[7.0]]), torch.tensor([[7.0, -7.0]]), shift=torch.tensor([[3]]), largest=7
    )
    _, penalties = whole(factors)
    assert of_overflow(penalties).tolist() == [[6.0, -6.0]]
    _, down = gradients(factors, lambda _, p: of_overflow(p).square().sum())
    assert down.tolist() == [[2 * 6 * 7 / 8, -2 * 6 * 7 / 8]]


def test_gradients_of_float_factors_inside_the_rounding_pass_inside_the_clamp_only() -> None:
    inside = InsideRounding(base_of("inside-rounding"), torch.randn(6, RANK) * 8, torch.randn(RANK, 32))
    is_inside = (inside.values() >= 0) & (inside.values() <= 15)
    assert is_inside.any() and not is_inside.all()
    direction = torch.randn(6, 32)
    losses: list[tuple[Loss, Tensor]] = [
        (lambda codes, _: (codes * direction).sum(), is_inside),
        (lambda _, penalties: (of_overflow(penalties) * direction).sum(), ~is_inside),
    ]
    for loss, passes in losses:
        moved = (direction * passes).double() / RANK
        up, down = gradients(inside, loss)
        assert torch.allclose(up, moved @ inside.lora_down.double().T, rtol=1e-4, atol=1e-5)
        assert torch.allclose(down, inside.lora_up.double().T @ moved, rtol=1e-4, atol=1e-5)
