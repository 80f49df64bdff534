"""Low-rank factors as they are stored: the grid of each component, the refit of one to the other, what is refused."""

import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import FactorDtype
from models.errors import SchemeError
from models.quant.factors import (
    FACTOR_SCHEMES,
    FLOAT_FACTORS,
    check_factors,
    check_single_factor,
    refit_up,
    store_factors,
)
from models.quant.grid import dense_factors
from models.types import Correction, QuantizedWeight
from tests.support.number_formats import int_symmetric, mxint

EVERY: tuple[FactorDtype, ...] = get_args(FactorDtype)
QUANTIZED: tuple[FactorDtype, ...] = tuple(FACTOR_SCHEMES)
WEIGHTINGS = ("identity", "diagonal", "full", "singular")


def factors(out_features: int = 64, in_features: int = 96, rank: int = 8) -> tuple[Tensor, Tensor]:
    """As reconstructors make them: orthonormal columns, and components that fade."""
    lora_up, _ = torch.linalg.qr(torch.randn(out_features, rank, dtype=torch.float64))
    return lora_up, torch.randn(rank, in_features, dtype=torch.float64) * torch.logspace(0, -2, rank)[:, None]


def product(correction: Correction) -> Tensor:
    lora_up, lora_down = dense_factors(correction)
    assert lora_down is not None
    return lora_up.double() @ lora_down.double()


def weighting_of(kind: str, size: int) -> Tensor | None:
    if kind == "identity":
        return None
    if kind == "diagonal":
        return torch.rand(size, dtype=torch.float64) ** 4 * (torch.arange(size) % 7 > 0)
    x = torch.randn(size // 4 if kind == "singular" else 4 * size, size, dtype=torch.float64)
    x *= torch.logspace(2, -2, size, dtype=torch.float64)
    return x.T @ x / len(x)


def weighted_loss(error: Tensor, weighting: Tensor | None) -> float:
    """``tr(A R A^T)``, row by row."""
    if weighting is None:
        return float((error**2).sum())
    full = weighting.diag() if weighting.dim() == 1 else weighting
    return sum(float(row @ full @ row) for row in error)


def test_every_factor_dtype_is_known_once() -> None:
    assert set(FLOAT_FACTORS) | set(FACTOR_SCHEMES) == set(EVERY)
    assert not set(FLOAT_FACTORS) & set(FACTOR_SCHEMES)


@pytest.mark.parametrize("factor_dtype", FLOAT_FACTORS)
def test_plain_factors_are_cast_and_their_product_is_kept(factor_dtype: FactorDtype) -> None:
    lora_up, lora_down = factors()
    correction = store_factors(lora_up, lora_down, factor_dtype)
    for factor, shape in ((correction.lora_up, (64, 8)), (correction.lora_down, (8, 96))):
        assert isinstance(factor, Tensor)
        assert factor.dtype == getattr(torch, factor_dtype)
        assert factor.is_contiguous()
        assert factor.shape == shape
    error = product(correction) - lora_up @ lora_down
    assert float(error.norm()) <= torch.finfo(getattr(torch, factor_dtype)).eps * float((lora_up @ lora_down).norm())


@pytest.mark.parametrize("factor_dtype", QUANTIZED)
def test_quantized_factors_lie_on_the_grid_of_their_component(factor_dtype: FactorDtype) -> None:
    lora_up, lora_down = factors()
    correction = store_factors(lora_up, lora_down, factor_dtype)
    assert isinstance(correction.lora_up, QuantizedWeight)
    assert isinstance(correction.lora_down, QuantizedWeight)
    assert correction.lora_up.codes.shape == (8, 64)
    assert correction.lora_down.codes.shape == (8, 96)
    assert correction.rank == 8
    found_up, found_down = dense_factors(correction)
    assert found_down is not None
    width = FACTOR_SCHEMES[factor_dtype].num_bits
    length = {"int8": 0, "int4": 32}.get(factor_dtype, 32)
    for component in range(8):
        # the two parts are scaled by a power of two and its inverse: undone by comparing with what it is for either
        for found, given_ in (
            (found_up[:, component], lora_up[:, component]),
            (found_down[component], lora_down[component]),
        ):
            power = 2.0 ** round(float((found.double().norm() / given_.norm()).log2()))
            values = (given_ * power).float().tolist()
            groups = [values[i : i + (length or len(values))] for i in range(0, len(values), length or len(values))]
            if factor_dtype.startswith("mxint"):
                expected = [float(value) for group in groups for value in mxint(group, width, "floor")]
                assert found.tolist() == expected
            else:
                expected = [value for group in groups for value in int_symmetric(group, width)]
                # the scale is rounded to float16, which may tip a value that lies halfway
                step = max(map(abs, values)) / (2 ** (width - 1) - 1)
                distances = [abs(a - b) for a, b in zip(found.tolist(), expected, strict=True)]
                assert max(distances) <= 1.01 * step + 2.0**-10 * max(map(abs, values))
                assert sum(distances) < 0.1 * step * len(distances)


@pytest.mark.parametrize("factor_dtype", EVERY)
def test_a_single_factor_is_stored_as_it_is(factor_dtype: FactorDtype) -> None:
    lora_up = torch.randn(48, 32)
    correction = store_factors(lora_up, None, factor_dtype)
    assert correction.lora_down is None
    assert correction.rank == 32
    found, nothing = dense_factors(correction)
    assert nothing is None
    assert found.shape == (48, 32)
    bits = {"bfloat16": 8, "float16": 11, "float32": 24}.get(factor_dtype) or FACTOR_SCHEMES[factor_dtype].num_bits - 1
    assert float((found.double() - lora_up.double()).norm()) <= 2.0 ** (1 - bits) * float(lora_up.double().norm())


@pytest.mark.parametrize(
    ("factor_dtype", "bits"),
    [("bfloat16", 16), ("float32", 32), ("int4", 4.5), ("mxint8", 8.25), ("mxint6", 6.25), ("mxint4", 4.25)],
)
def test_stored_bits_are_counted(factor_dtype: FactorDtype, bits: float) -> None:
    assert store_factors(*factors(), factor_dtype).num_stored_bits == bits * 8 * (64 + 96)
    assert store_factors(torch.randn(48, 32), None, factor_dtype).num_stored_bits == bits * 48 * 32


def test_int8_counts_one_scale_per_component_of_each_factor() -> None:
    assert store_factors(*factors(), "int8").num_stored_bits == 8 * 8 * (64 + 96) + 2 * 8 * 16
    assert store_factors(torch.randn(48, 20), None, "int8").num_stored_bits == 8 * 48 * 20 + 48 * 16


@pytest.mark.parametrize("factor_dtype", EVERY)
@pytest.mark.parametrize("exponent", [-60, -20, 0, 14, 60])
def test_unbalanced_factors_neither_overflow_nor_vanish(factor_dtype: FactorDtype, exponent: int) -> None:
    lora_up, lora_down = factors()
    plain = product(store_factors(lora_up, lora_down, factor_dtype))
    shifted = product(store_factors(lora_up * 2.0**exponent, lora_down * 2.0**-exponent, factor_dtype))
    assert torch.equal(plain, shifted)
    assert float((plain - lora_up @ lora_down).norm()) <= 0.2 * float((lora_up @ lora_down).norm())


@pytest.mark.parametrize("factor_dtype", EVERY)
def test_components_of_zero_are_stored_exactly(factor_dtype: FactorDtype) -> None:
    lora_up, lora_down = factors()
    lora_down[3:] = 0
    lora_up[:, 5] = 0
    correction = store_factors(lora_up, lora_down, factor_dtype)
    found_up, found_down = dense_factors(correction)
    assert found_down is not None
    assert not found_down[3:].any()
    assert not found_up[:, 5].any()
    assert product(correction).isfinite().all()


@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("factor_dtype", EVERY)
def test_the_refit_never_loses_against_the_factor_it_replaces(factor_dtype: FactorDtype, kind: str) -> None:
    error = torch.randn(64, 96, dtype=torch.float64)
    weighting = weighting_of(kind, 96)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    lora_up, lora_down = u[:, :8], s[:8, None] * v[:8]
    _, stored_down = dense_factors(store_factors(lora_up, lora_down, factor_dtype))
    assert stored_down is not None
    refitted = refit_up(error, stored_down, 8, weighting)
    # what the stored lora_down is paired with when nothing is refitted, before lora_up is stored in turn
    power = 2.0 ** (stored_down.double().norm(dim=1) / lora_down.norm(dim=1)).log2().round()
    before = weighted_loss(error - (lora_up / power) @ stored_down.double(), weighting)
    after = weighted_loss(error - refitted @ stored_down.double(), weighting)
    assert after <= before * (1 + 1e-9)
    if kind != "identity":
        assert after < 0.99 * before  # the factors were best for the identity, not for this


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(WEIGHTINGS), rank=st.integers(1, 6), seed=st.integers(0, 2**31), is_single=st.booleans())
def test_no_other_factor_does_better_than_the_refitted_one(kind: str, rank: int, seed: int, is_single: bool) -> None:
    torch.manual_seed(seed)
    error, weighting = torch.randn(5, 24, dtype=torch.float64), weighting_of(kind, 24)
    lora_down = torch.randn(rank, 24, dtype=torch.float64) * torch.logspace(0, -6, rank, dtype=torch.float64)[:, None]
    reading = torch.eye(rank, 24, dtype=torch.float64) if is_single else lora_down
    best = refit_up(error, None if is_single else lora_down, rank, weighting)
    least = weighted_loss(error - best @ reading, weighting)
    sizes = reading.norm(dim=1)
    for step in (1e-1, 1e-3):
        other = best + torch.randn_like(best) * step / sizes
        assert least <= weighted_loss(error - other @ reading, weighting) * (1 + 1e-9)


@pytest.mark.parametrize("factor_dtype", QUANTIZED)
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_storing_with_the_error_comes_closer_than_without(factor_dtype: FactorDtype, kind: str) -> None:
    error, weighting = torch.randn(64, 96, dtype=torch.float64), weighting_of(kind, 96)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    lora_up, lora_down = u[:, :32], s[:32, None] * v[:32]
    losses = [
        weighted_loss(error - product(store_factors(lora_up, lora_down, factor_dtype, *refit)), weighting)
        for refit in ((), (error, weighting))
    ]
    # lora_up is quantized after it is fitted: no guarantee, but it pays
    assert losses[1] <= losses[0] * (1.001 if factor_dtype in {"int8", "mxint8"} and kind == "identity" else 1.0)


@pytest.mark.parametrize("factor_dtype", EVERY)
def test_dead_channels_and_repeated_components_do_not_break_the_refit(factor_dtype: FactorDtype) -> None:
    error = torch.randn(64, 96)
    lora_up, lora_down = factors()
    lora_down[1], lora_down[2] = lora_down[0], 0
    weighting = torch.zeros(96, dtype=torch.float64)
    weighting[:5] = 1
    correction = store_factors(lora_up, lora_down, factor_dtype, error, weighting)
    assert product(correction).isfinite().all()
    assert float(product(correction).abs().max()) < 1e3


def test_a_rank_of_zero_is_stored_as_nothing() -> None:
    for factor_dtype, lora_down in itertools.product(EVERY, (torch.zeros(0, 96), None)):
        correction = store_factors(torch.zeros(64, 0), lora_down, factor_dtype, torch.randn(64, 96))
        assert correction.rank == 0
        assert correction.num_stored_bits == 0


@pytest.mark.parametrize("factor_dtype", EVERY)
def test_groups_that_do_not_divide_are_refused_with_the_layer(factor_dtype: FactorDtype) -> None:
    check_factors(factor_dtype, 64, 96, "layers.0.q_proj")
    check_single_factor(factor_dtype, 128, "layers.0.q_proj")
    if factor_dtype in {"int4", "mxint8", "mxint6", "mxint4"}:
        with pytest.raises(SchemeError, match=rf"layers\.0\.q_proj: factor_dtype {factor_dtype} .* 48 output channels"):
            check_factors(factor_dtype, 48, 96, "layers.0.q_proj")
        with pytest.raises(SchemeError, match=r"which do not divide 80 input channels; choose int8 or bfloat16"):
            check_factors(factor_dtype, 64, 80, "layers.0.q_proj")
        with pytest.raises(SchemeError, match=r"groups of 32, which do not divide 20 channels of its single factor"):
            check_single_factor(factor_dtype, 20, "layers.0.q_proj")
        with pytest.raises(SchemeError, match=f"lora_down cannot be stored as {factor_dtype}: .*does not divide"):
            store_factors(*factors(64, 80), factor_dtype)
    else:
        check_factors(factor_dtype, 48, 80, "layers.0.q_proj")
        check_single_factor(factor_dtype, 20, "layers.0.q_proj")


@pytest.mark.parametrize("factor_dtype", EVERY)
def test_factors_that_are_not_finite_or_too_large_are_refused(factor_dtype: FactorDtype) -> None:
    lora_up, lora_down = factors()
    broken = lora_up.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(SchemeError, match=r"lora_up"):
        store_factors(broken, lora_down, factor_dtype)
    if factor_dtype in {"float16", "int8", "int4"}:
        with pytest.raises(SchemeError, match=r"lora_down.* float16"):
            store_factors(lora_up * 1e9, lora_down * 1e9, factor_dtype)
