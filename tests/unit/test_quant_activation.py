"""Dynamic activation quantization against loops over the definitions, one token and group at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.errors import SchemeError
from models.quant.activation import quantize_activations
from models.scheme import ActivationScheme, ExponentRule
from tests.support.number_formats import int_asymmetric, int_symmetric, mxfp4, mxint

INT = [
    ActivationScheme(bits, size, is_symmetric)
    for bits, size, is_symmetric in itertools.product((2, 4, 6, 8), (-1, 32, 64), (False, True))
]
CLIPPED = [
    ActivationScheme(bits, size, is_symmetric, clip_ratio=ratio)
    for bits, size, is_symmetric, ratio in itertools.product((2, 4, 8), (-1, 32), (False, True), (0.99, 0.7, 0.2))
]
RULES: tuple[ExponentRule, ...] = ("floor", "ceil")
BLOCK = [
    *(
        ActivationScheme(bits, size, format="mxint", exponent=rule)
        for bits, size, rule in itertools.product((4, 6, 8), (16, 32), RULES)
    ),
    ActivationScheme(4, 32, format="mxfp4"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_BLOCKS = [ActivationScheme(bits, 16, format="mxint", exponent=rule) for bits in (2, 8) for rule in RULES]


def group_values(group: Sequence[float], scheme: ActivationScheme) -> list[float]:
    if scheme.format == "mxfp4":
        return [float(value) for value in mxfp4(group)]
    if scheme.format == "mxint":
        return [float(value) for value in mxint(group, scheme.num_bits, scheme.exponent)]
    return (int_symmetric if scheme.is_symmetric else int_asymmetric)(group, scheme.num_bits, scheme.clip_ratio)


def expected_values(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Token by token and group by group, in Python's numbers."""
    rows = []
    for row in x.double().tolist():
        length = len(row) if scheme.group_size == -1 else scheme.group_size
        groups = [row[start : start + length] for start in range(0, len(row), length)]
        rows.append([value for group in groups for value in group_values(group, scheme)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scheme", [*INT, *CLIPPED, *BLOCK], ids=str)
def test_every_token_is_rounded_as_the_definition_says(scheme: ActivationScheme) -> None:
    x = torch.randn(5, 128) * torch.tensor([1e-3, 0.1, 1, 10, 100])[:, None] + 0.2
    found = quantize_activations(x, scheme)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    assert torch.allclose(found.double(), expected_values(x, scheme), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", [*INT, *BLOCK], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_types_are_computed_in_float32_and_rounded_once(scheme: ActivationScheme, dtype: torch.dtype) -> None:
    x = torch.randn(5, 128).to(dtype)
    assert torch.equal(quantize_activations(x, scheme), quantize_activations(x.float(), scheme).to(dtype))


@given(
    values=st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32) | st.integers(-40, 40).map(lambda n: n / 4), min_size=32, max_size=32
    ),
    scheme=st.sampled_from([*BLOCK, *SMALL_BLOCKS]),
)
def test_block_formats_are_exact_for_any_values(values: list[float], scheme: ActivationScheme) -> None:
    if any(0 < max(map(abs, half)) < 2.0**-100 for half in (values[:16], values[16:], values)):
        return  # there the exponent stops at that of the smallest normal float32
    x = torch.tensor([values])
    assert quantize_activations(x, scheme).tolist() == expected_values(x, scheme).tolist()


@given(
    values=st.lists(
        st.floats(-(2.0**127), 2.0**127, width=32) | st.integers(-9, 9).map(float), min_size=32, max_size=32
    ),
    scheme=st.sampled_from(INT[::3]),
)
def test_integer_formats_stay_within_half_a_step_and_keep_zeros(values: list[float], scheme: ActivationScheme) -> None:
    scheme = ActivationScheme(scheme.num_bits, 32, scheme.is_symmetric)
    x = torch.tensor([values])
    found = quantize_activations(x, scheme)
    assert found.isfinite().all()
    if scheme.is_symmetric:
        step = max(map(abs, values)) / (2 ** (scheme.num_bits - 1) - 1)
    else:
        step = (max(0.0, *values) - min(0.0, *values)) / (2**scheme.num_bits - 1)
    # An asymmetric grid is shifted by up to half a step to hold zero: what falls off its end is clamped.
    most = (0.5 if scheme.is_symmetric else 1.0) * step * (1 + 1e-4) + 2.0**-126
    assert float((found.double() - x.double()).abs().max()) <= most
    assert not found[x == 0].any()


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    num_bits=st.sampled_from((2, 4, 8)),
    is_symmetric=st.booleans(),
    ratio=st.floats(0.01, 1, exclude_min=True),
)
def test_a_clipped_grid_ends_at_its_share_of_the_range_and_rounds_what_is_inside(
    values: list[float], num_bits: int, is_symmetric: bool, ratio: float
) -> None:
    x = torch.tensor([values])
    found = quantize_activations(x, ActivationScheme(num_bits, 32, is_symmetric, clip_ratio=ratio)).double()
    low, high = ratio * min(0.0, *values), ratio * max(0.0, *values)
    if is_symmetric:
        high = max(high, -low)
        low, step = -high, high / (2 ** (num_bits - 1) - 1)
    else:
        step = (high - low) / (2**num_bits - 1)
    # An asymmetric grid is shifted by up to half a step to hold zero.
    shift = (0.0 if is_symmetric else 0.5) * step
    slack = 1e-4 * step + 2.0**-126
    assert float(found.min()) >= low - shift - slack
    assert float(found.max()) <= high + shift + slack
    assert float((found - x.double().clamp(low, high)).abs().max()) <= 0.5 * step + shift + slack
    assert not found[x == 0].any()


def test_a_clip_ratio_of_one_changes_no_bit() -> None:
    x = torch.randn(64, 128) * torch.logspace(-30, 30, 64)[:, None]
    for scheme in INT:
        plain = quantize_activations(x, scheme)
        assert torch.equal(quantize_activations(x, replace(scheme, clip_ratio=1.0)), plain)
        # Anything below one does, however little it is.
        assert not torch.equal(quantize_activations(x, replace(scheme, clip_ratio=1 - 2**-10)), plain)


def test_clipping_an_outlier_serves_the_other_channels() -> None:
    x = torch.randn(64, 64)
    x[:, 3] = 12.0
    others = torch.arange(64) != 3

    def error(scheme: ActivationScheme) -> float:
        return float((quantize_activations(x, scheme) - x)[:, others].norm())

    assert error(ActivationScheme(4, -1, True, clip_ratio=0.3)) < error(ActivationScheme(4, -1, True)) / 2


@pytest.mark.parametrize("scheme", [*INT, *CLIPPED, *BLOCK], ids=str)
def test_tokens_and_groups_do_not_influence_each_other(scheme: ActivationScheme) -> None:
    x = torch.randn(6, 128) * torch.logspace(-3, 3, 6)[:, None]
    whole = quantize_activations(x, scheme)
    alone = torch.cat([quantize_activations(row, scheme) for row in torch.split(x, 1)])
    assert torch.equal(whole, alone)
    if scheme.group_size != -1:
        parts = [quantize_activations(part, scheme) for part in torch.split(x, scheme.group_size, 1)]
        assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("scheme", [*INT, *BLOCK], ids=str)
def test_what_is_quantized_stays_where_it_is(scheme: ActivationScheme) -> None:
    x = torch.randn(8, 128).clamp(-1.8, 1.8)
    x[:, ::16] = 1.9  # the ceil rule clips a largest value that is a power of two
    once = quantize_activations(x, scheme)
    twice = quantize_activations(once, scheme)
    if scheme.format == "int":
        assert torch.allclose(once, twice, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(once, twice)


@pytest.mark.parametrize("scheme", [*INT, *CLIPPED, *BLOCK], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_zeros_stays_zero_beside_others(scheme: ActivationScheme, dtype: torch.dtype) -> None:
    x = torch.randn(3, 128).to(dtype)
    x[1] = 0
    x[2, :64] = 0
    found = quantize_activations(x, scheme)
    assert found.isfinite().all()
    assert not found[1].any()
    assert not found[2, :64].any()
    assert found[2, 64:].any()


@pytest.mark.parametrize("scheme", [*INT, *BLOCK], ids=str)
def test_the_input_is_left_as_it_was_and_shapes_are_kept(scheme: ActivationScheme) -> None:
    x = torch.randn(2, 3, 128)
    copy = x.clone()
    found = quantize_activations(x, scheme)
    assert torch.equal(x, copy)
    assert found.shape == (2, 3, 128)
    assert torch.equal(found[1, 2], quantize_activations(x[1, 2], scheme))
    assert quantize_activations(torch.empty(0, 128), scheme).shape == (0, 128)
    strided = torch.stack((x, -x), -1)[..., 0]
    assert torch.equal(quantize_activations(strided, scheme), found)


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_more_bits_and_smaller_groups_come_closer(is_symmetric: bool) -> None:
    x = torch.randn(64, 256)
    x[:, 7] *= 40  # the outlier channel that activations are known for

    def error(bits: int, size: int) -> float:
        return float((quantize_activations(x, ActivationScheme(bits, size, is_symmetric)) - x).norm())

    assert error(8, -1) < error(6, -1) / 2 < error(4, -1) / 4
    assert error(4, 32) < error(4, 128) < error(4, -1)


@pytest.mark.parametrize("scheme", [ActivationScheme(4, 64), *BLOCK[-2:]], ids=str)
def test_groups_that_do_not_tile_the_channels_are_refused(scheme: ActivationScheme) -> None:
    with pytest.raises(SchemeError, match=f"activations: activation group_size {scheme.group_size} does not divide"):
        quantize_activations(torch.randn(2, 72), scheme)
