"""What every reconstruction method must keep, over the whole registry.

The loss that a method claims to minimise is written down here a second time, as the root S of the papers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from models.config import QuantScheme, ReconstructConfig
from models.errors import CalibrationError, SchemeError
from models.quant.affine import dequantize
from models.quant.rtn import quantize_rtn
from models.reconstruct import RECONSTRUCTORS, get_reconstructor
from models.types import InputStatistics, LinearWeights, QuantizedWeight, Statistic

SCHEME = QuantScheme(3, 32)


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def l2qer_root(mean_abs: Tensor) -> Tensor:
    sizes = mean_abs.clamp(min=1e-4)
    return (sizes / (sizes.min() * sizes.max()).sqrt()).diag()


ROOTS: dict[str, Callable[[InputStatistics], Tensor]] = {
    "none": lambda statistics: torch.eye(len(statistics.mean_square), dtype=torch.float64),
    "rtn": lambda statistics: torch.eye(len(statistics.mean_square), dtype=torch.float64),
    "zeroquant-v2": lambda statistics: torch.eye(len(statistics.mean_square), dtype=torch.float64),
    "lqer": lambda statistics: torch.eye(len(statistics.mean_square), dtype=torch.float64),
    "l2qer": lambda statistics: l2qer_root(statistics.mean_abs),
    "qera-approx": lambda statistics: statistics.mean_square.sqrt().diag(),
    "qera-exact": lambda statistics: symmetric_root(statistics.autocorrelation),
}
CORRECTING = [method for method in RECONSTRUCTORS if method not in ("none", "rtn")]


@dataclass
class Case:
    weight: Tensor
    statistics: InputStatistics

    @property
    def base_error(self) -> Tensor:
        return (self.weight - dequantize(quantize(self.weight))).double()


def quantize(weight: Tensor) -> QuantizedWeight:
    return quantize_rtn(weight, SCHEME)


def make_case(name: str) -> Case:
    shape = (96, 64) if name == "tall" else (48, 64)
    weight = torch.randn(shape) * 0.05
    sizes = torch.logspace(1, -2, 64, dtype=torch.float64)
    rotation, _triangle = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    x = torch.randn(10 if name == "few tokens" else 400, 64, dtype=torch.float64) * sizes @ rotation
    if name == "dead channel":
        x[:, 5] = 0
    if name == "constant column":
        weight[:, 9] = 0.03
        weight[:, 11] = 0
    if name == "no error":
        weight = torch.zeros(shape)
    return Case(weight, InputStatistics(len(x), x.T @ x / len(x), x.square().mean(0), x.abs().mean(0)))


CASES = ["healthy", "tall", "dead channel", "constant column", "few tokens", "no error"]


def build(method: str, case: Case, rank: int = 8, factor_dtype: str = "float32") -> LinearWeights:
    config = ReconstructConfig(method, rank, factor_dtype)
    return get_reconstructor(config).reconstruct(case.weight, case.statistics, quantize)


def remaining_error(case: Case, weights: LinearWeights) -> Tensor:
    if weights.correction is None:
        return case.base_error
    assert weights.correction.lora_down is not None
    return case.base_error - weights.correction.lora_up.double() @ weights.correction.lora_down.double()


def loss(error: Tensor, root: Tensor) -> float:
    return float((root @ error.T).square().sum())


def test_every_method_has_its_loss_written_down_here() -> None:
    assert ROOTS.keys() == RECONSTRUCTORS.keys()


@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_the_claimed_loss_is_never_above_the_base_quantizers(method: str, name: str, factor_dtype: str) -> None:
    case = make_case(name)
    root = ROOTS[method](case.statistics)
    achieved = loss(remaining_error(case, build(method, case, factor_dtype=factor_dtype)), root)
    assert achieved <= loss(case.base_error, root)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", CORRECTING)
def test_the_claimed_loss_is_the_least_that_its_rank_allows(method: str, name: str) -> None:
    """Eckart-Young: no matrix of rank k comes closer than the trailing singular values of S E."""
    case = make_case(name)
    root = ROOTS[method](case.statistics)
    singular_values = torch.linalg.svdvals(root @ case.base_error.T)
    achieved = loss(remaining_error(case, build(method, case)), root)
    least = float(singular_values[8:].square().sum())
    assert achieved == pytest.approx(least, rel=1e-6, abs=1e-10 * float(singular_values.square().sum()))


@pytest.mark.parametrize("name", ["healthy", "tall", "constant column"])
@pytest.mark.parametrize("method", CORRECTING)
def test_the_correction_is_the_textbook_one(method: str, name: str) -> None:
    case = make_case(name)
    root = ROOTS[method](case.statistics)
    left, sizes, right = torch.linalg.svd(root @ case.base_error.T, full_matrices=False)
    expected = torch.linalg.solve(root, left[:, :8] * sizes[:8] @ right[:8]).T
    given = case.base_error - remaining_error(case, build(method, case))
    assert torch.allclose(given, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", CORRECTING)
def test_full_rank_leaves_no_loss(method: str, name: str) -> None:
    case = make_case(name)
    root = ROOTS[method](case.statistics)
    achieved = loss(remaining_error(case, build(method, case, rank=min(case.weight.shape))), root)
    assert achieved <= 1e-10 * loss(case.base_error, root)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_the_same_layer_gives_the_same_bytes(method: str, name: str) -> None:
    case = make_case(name)
    first, second = build(method, case), build(method, case)
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    if first.correction is not None:
        assert second.correction is not None
        assert torch.equal(first.correction.lora_up, second.correction.lora_up)
        assert torch.equal(first.correction.lora_down, second.correction.lora_down)


@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", CORRECTING)
def test_factors_have_the_shape_and_dtype_asked_for_and_are_finite(method: str, name: str, factor_dtype: str) -> None:
    case = make_case(name)
    weights = build(method, case, rank=5, factor_dtype=factor_dtype)
    correction = weights.correction
    assert correction is not None
    assert correction.lora_down is not None
    assert correction.lora_up.shape == (case.weight.shape[0], 5)
    assert correction.lora_down.shape == (5, case.weight.shape[1])
    for factor in (correction.lora_up, correction.lora_down):
        assert factor.dtype == getattr(torch, factor_dtype)
        assert factor.is_contiguous()
        assert factor.isfinite().all()


@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_codes_are_those_of_the_quantizer_and_rank_zero_is_nothing_else(method: str) -> None:
    case = make_case("healthy")
    for rank in (0, 8):
        assert torch.equal(build(method, case, rank).quantized.codes, quantize(case.weight).codes)
    assert build(method, case, rank=0).correction is None


@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_the_required_statistics_are_enough(method: str) -> None:
    case = make_case("healthy")
    requires = get_reconstructor(ReconstructConfig(method)).requires
    only = InputStatistics(400, **{name: getattr(case.statistics, name) for name in requires})
    given, expected = build(method, replace(case, statistics=only)), build(method, case)
    assert torch.equal(remaining_error(case, given), remaining_error(case, expected))


@pytest.mark.parametrize(("method", "statistic"), [(m, s) for m in CORRECTING for s in Statistic])
def test_a_statistic_that_is_unusable_is_named_when_it_is_needed(method: str, statistic: Statistic) -> None:
    case = make_case("healthy")
    good = getattr(case.statistics, statistic)
    is_needed = statistic in get_reconstructor(ReconstructConfig(method)).requires
    nan, infinite, negative = good.clone(), good.clone(), good.clone()
    nan.view(-1)[0], infinite.view(-1)[-1], negative.view(-1)[0] = float("nan"), float("inf"), -1.0
    for bad in (nan, infinite, negative, good[:-1], None):
        broken = replace(case, statistics=replace(case.statistics, **{statistic: bad}))
        if is_needed:
            with pytest.raises(CalibrationError, match=statistic):
                build(method, broken)
        else:
            build(method, broken)


@pytest.mark.parametrize("method", CORRECTING)
def test_a_rank_above_the_smaller_dimension_is_refused_by_layer_before_any_weight_is_read(method: str) -> None:
    reconstructor = get_reconstructor(ReconstructConfig(method, rank=49))
    reconstructor.check(49, 64, "model.layers.0.mlp.up_proj")
    with pytest.raises(SchemeError, match=r"model\.layers\.3\.mlp\.up_proj: rank 49 .* 48 x 64 .* at most 48"):
        reconstructor.check(48, 64, "model.layers.3.mlp.up_proj")
    with pytest.raises(SchemeError, match="at most 48"):
        build(method, make_case("healthy"), rank=49)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemeError, match=r"'svd' is unknown; choose one of .*qera-exact"):
        get_reconstructor(ReconstructConfig("svd"))
