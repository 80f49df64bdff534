"""Targets and corrections for quantized inputs, against least squares on the tokens themselves."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.errors import CalibrationError, SchemeError
from models.quant.grid import dense_factors, dequantize
from models.reconstruct import get_reconstructor
from models.reconstruct.loss import stored_weight
from models.reconstruct.regression import REQUIRES_REFIT, output_target, refit
from models.types import InputStatistics, LinearWeights, Statistic
from tests.support.reconstruct_cases import build, coarse, config_of, correlated_inputs, make_case, quantize, without


def drifted(x: Tensor) -> Tensor:
    """Inputs as quantized layers before this one leave them: of full rank, and quantized here too."""
    return coarse(x) + 0.3 * torch.randn_like(x)


def statistics_of(dense: Tensor, seen: Tensor) -> InputStatistics:
    return InputStatistics(
        num_tokens=len(dense),
        autocorrelation=dense.T @ dense / len(dense),
        quantized_autocorrelation=seen.T @ seen / len(dense),
        cross_correlation=seen.T @ dense / len(dense),
    )


def ridge(dense: Tensor, seen: Tensor, weight: Tensor, damping: float) -> Tensor:
    """Least squares on the tokens, with rows below them that pull towards the weight."""
    lam = damping * float(seen.square().mean())
    pull = (lam * len(seen)) ** 0.5 * torch.eye(seen.shape[1], dtype=torch.float64)
    design, wanted = torch.cat([seen, pull]), torch.cat([dense @ weight.T, pull @ weight.T])
    return torch.linalg.lstsq(design, wanted).solution.T


def output_loss(dense: Tensor, seen: Tensor, weight: Tensor, used: Tensor) -> float:
    return float((dense @ weight.double().T - seen @ used.double().T).square().sum() / len(dense))


def corrected(weight: Tensor, statistics: InputStatistics, method: str = "qera-exact", rank: int = 8) -> LinearWeights:
    config = config_of(method, rank)
    return build(replace(make_case("healthy"), weight=weight, statistics=statistics), config)[0]


@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_the_target_is_the_ridge_regression_towards_the_weight(damping: float) -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64, dtype=torch.float64)
    seen = drifted(x)
    target = output_target(weight, statistics_of(x, seen), damping)
    assert torch.allclose(target, ridge(x, seen, weight, damping), rtol=0, atol=1e-8)


def test_the_distance_to_the_target_is_the_output_error_but_for_a_constant() -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64, dtype=torch.float64)
    seen = drifted(x)
    target = output_target(weight, statistics_of(x, seen), 0.0)
    constant = output_loss(x, seen, weight, target)
    for _ in range(5):
        used = weight + torch.randn(48, 64, dtype=torch.float64)
        distance = float((seen @ (target - used).T).square().sum() / len(x))
        assert output_loss(x, seen, weight, used) == pytest.approx(constant + distance, rel=1e-9)


def test_the_target_of_unchanged_inputs_is_the_weight() -> None:
    x, weight = correlated_inputs(20), torch.randn(48, 64)
    assert torch.equal(output_target(weight, statistics_of(x, x)), weight)


def test_inputs_of_nothing_leave_the_weight_as_it_is() -> None:
    nothing, weight = torch.zeros(20, 64, dtype=torch.float64), torch.randn(48, 64)
    assert torch.equal(output_target(weight, statistics_of(nothing, nothing)), weight)


def test_channels_that_always_round_to_zero_need_damping() -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64)
    seen = drifted(x)
    seen[:, 5] = 0
    with pytest.raises(CalibrationError, match=r"quantized_autocorrelation .* singular; .* raise the damping"):
        output_target(weight, statistics_of(x, seen), 0.0)
    target = output_target(weight, statistics_of(x, seen))
    assert target.dtype == torch.float32
    assert torch.equal(target[:, 5], weight[:, 5])


def regression_by_svd(target: Tensor, codes: Tensor, seen: Tensor, rank: int) -> float:
    """Least loss of any rank-k correction: the fitted outputs cut to their k leading components."""
    singular_values = torch.linalg.svdvals(seen @ (target - codes).T)
    return float(singular_values[rank:].square().sum() / len(seen))


@pytest.mark.parametrize("rank", [1, 8, 48])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_the_refit_is_the_best_correction_of_its_rank(rank: int, damping: float) -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64)
    seen = drifted(x)
    statistics = statistics_of(x, seen)
    before = corrected(weight, statistics, rank=rank)
    after = refit(before, weight, statistics, "float32", rank, damping=damping)
    assert torch.equal(after.quantized.codes, before.quantized.codes)
    target = ridge(x, seen, weight.double(), damping)
    codes = dequantize(before.quantized).double()
    achieved = float((seen @ (target - stored_weight(after)).T).square().sum() / len(x))
    least = regression_by_svd(target, codes, seen, rank)
    scale = regression_by_svd(target, codes, seen, 0)
    assert achieved == pytest.approx(least, rel=1e-5, abs=1e-9 * scale)


@pytest.mark.parametrize("method", ["zeroquant-v2", "l2qer", "qera-exact", "loftq", "srr"])
def test_a_refit_lowers_the_output_error_of_any_method(method: str) -> None:
    case = make_case("healthy")
    x = correlated_inputs(400)
    seen = drifted(x)
    case = without(case, **{
        name: getattr(statistics_of(x, seen), name)
        for name in ("autocorrelation", "quantized_autocorrelation", "cross_correlation")
    })  # fmt: skip
    before, _ = build(case, config_of(method))
    after = refit(before, case.weight, case.statistics, "float32", 8)
    losses = [output_loss(x, seen, case.weight, stored_weight(weights)) for weights in (before, after)]
    assert losses[1] < losses[0]


def test_a_refit_on_unchanged_inputs_is_qera_exact() -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64)
    statistics = statistics_of(x, x)
    exact = corrected(weight, statistics)
    from_lqer = refit(corrected(weight, statistics, "lqer"), weight, statistics, "float32", 8)
    assert torch.allclose(stored_weight(from_lqer), stored_weight(exact), atol=1e-6)


def test_a_single_matrix_is_refitted_by_least_squares_on_its_channels() -> None:
    case = make_case("tall")
    weights, ordered = build(case, config_of("serq", 32, "float32"))
    x, weight = correlated_inputs(400), ordered.weight.double()
    seen = drifted(x)
    statistics = statistics_of(x, seen)
    after = refit(weights, ordered.weight, statistics, "float32", 32)
    codes = dequantize(weights.quantized).double()
    lam = 1e-2 * float(seen.square().mean())
    pull = (lam * len(x)) ** 0.5 * torch.eye(32, dtype=torch.float64)
    outputs = seen @ (ridge(x, seen, weight, 1e-2) - codes).T
    wanted = torch.cat([outputs, pull @ (weight - codes)[:, :32].T])
    expected = torch.linalg.lstsq(torch.cat([seen[:, :32], pull]), wanted).solution.T
    assert after.correction is not None
    lora_up, lora_down = dense_factors(after.correction)
    assert lora_down is None
    assert torch.allclose(lora_up.double(), expected, rtol=0, atol=1e-5)
    losses = [output_loss(x, seen, weight, stored_weight(given)) for given in (weights, after)]
    assert losses[1] < losses[0]


def test_a_salient_channel_that_calibration_never_saw_keeps_its_weight() -> None:
    case = make_case("tall")
    weights, ordered = build(case, config_of("serq", 32, "float32"))
    x = correlated_inputs(400)
    seen = drifted(x)
    seen[:, 3] = x[:, 3] = 0
    after = refit(weights, ordered.weight, statistics_of(x, seen), "float32", 32)
    assert torch.allclose(stored_weight(after)[:, 3], ordered.weight[:, 3].double(), atol=1e-6)


@pytest.mark.parametrize("factor_dtype", ["int4", "mxint4", "int8", "bfloat16"])
@pytest.mark.parametrize("method", ["serq", "qera-exact"])
def test_a_refit_that_rounding_spoils_is_not_taken(method: str, factor_dtype: str) -> None:
    case = make_case("tall")
    before, ordered = build(case, config_of(method, 32, factor_dtype))
    after = refit(before, ordered.weight, ordered.statistics, factor_dtype, 32)
    target = output_target(ordered.weight.double(), ordered.statistics)
    weighting = ordered.statistics.quantized_autocorrelation
    errors = [target - stored_weight(given) for given in (before, after)]
    losses = [float(torch.trace(error @ weighting @ error.T)) for error in errors]
    assert losses[1] <= losses[0] * (1 + 1e-9)
    assert after.correction.rank == 32


def test_codes_without_a_correction_get_one_and_rank_zero_leaves_them_alone() -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64)
    statistics = statistics_of(x, drifted(x))
    plain = corrected(weight, statistics, "none")
    fitted = refit(plain, weight, statistics, "float32", 8)
    expected = refit(corrected(weight, statistics), weight, statistics, "float32", 8)
    assert torch.equal(stored_weight(fitted), stored_weight(expected))
    assert refit(plain, weight, statistics, "float32", 0) is plain
    assert refit(plain, weight, statistics, "float32") is plain


def test_without_a_rank_the_refit_has_that_of_the_old_correction() -> None:
    x, weight = correlated_inputs(400), torch.randn(48, 64)
    statistics = statistics_of(x, drifted(x))
    before = corrected(weight, statistics, rank=5)
    same, given = (refit(before, weight, statistics, "float32", rank) for rank in (None, 5))
    assert torch.equal(stored_weight(same), stored_weight(given))


def test_a_rank_that_a_refit_cannot_have_is_refused_before_any_weight_is_read() -> None:
    config = config_of("none", 49)
    get_reconstructor(config).check(48, 64, "a layer left uncorrected")
    with pytest.raises(SchemeError, match=r"layers\.0\.up_proj: rank 49 .* 48 x 64 .* at most 48"):
        get_reconstructor(replace(config, refit=True)).check(48, 64, "layers.0.up_proj")
    case = make_case("healthy")
    with pytest.raises(SchemeError, match="at most 48"):
        refit(LinearWeights(quantize(case.weight)), case.weight, case.statistics, "float32", 49)


def test_inputs_of_nothing_leave_corrections_finite() -> None:
    nothing = torch.zeros(20, 64, dtype=torch.float64)
    for method in ("serq", "qera-exact"):
        weights, ordered = build(make_case("healthy"), config_of(method))
        after = refit(weights, ordered.weight, statistics_of(nothing, nothing), "float32", 8)
        assert stored_weight(after).isfinite().all()


@pytest.mark.parametrize("statistic", sorted(REQUIRES_REFIT))
@pytest.mark.parametrize("spoil", ["missing", "short", "nan"])
def test_an_unusable_statistic_is_named(statistic: Statistic, spoil: str) -> None:
    case = make_case("healthy")
    weights = LinearWeights(quantize(case.weight), build(case, config_of("lqer"))[0].correction)
    good = getattr(case.statistics, statistic)
    bad = {"missing": None, "short": good[:-1], "nan": good * float("nan")}[spoil]
    with pytest.raises(CalibrationError, match=statistic):
        refit(weights, case.weight, without(case, **{statistic: bad}).statistics, "float32", 8)
    with pytest.raises(CalibrationError, match=statistic):
        output_target(case.weight, without(case, **{statistic: bad}).statistics)
