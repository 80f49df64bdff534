"""What sets the methods apart, and the errors that the build reports."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.config import ReconstructConfig
from models.errors import CalibrationError
from models.quant.grid import dequantize
from models.reconstruct import get_reconstructor
from models.reconstruct.loss import effective_weight, layer_errors, weighted_square
from models.types import Correction, InputStatistics, LinearWeights, Statistic
from tests.support.reconstruct_cases import (
    Case,
    all_statistics,
    config_of,
    correlated_inputs,
    quantize,
    remaining_error,
)

SAME_CODES = ["none", "rtn", "zeroquant-v2", "lqer", "l2qer", "qera-approx", "loftq"]


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(len(x), x.T @ x / len(x), x.square().mean(0), x.abs().mean(0))


def build(method: str, weight: Tensor, statistics: InputStatistics, rank: int = 8) -> LinearWeights:
    return get_reconstructor(ReconstructConfig(method, rank, "float32")).reconstruct(weight, statistics, quantize)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", SAME_CODES)
def test_no_correction_of_the_same_codes_has_a_smaller_output_error_than_qera_exact(method: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(48, 64), correlated_inputs(300)
    statistics = statistics_of(x)

    def output_error(name: str) -> float:
        restored = effective_weight(build(name, weight, statistics))
        return float((x @ (weight.double() - restored).T).square().sum())

    assert output_error("qera-exact") < output_error(method)


def test_qera_approx_is_qera_exact_when_channels_are_uncorrelated() -> None:
    weight, mean_square = torch.randn(48, 64), torch.logspace(1, -3, 64, dtype=torch.float64)
    statistics = InputStatistics(100, mean_square.diag(), mean_square)
    exact, approx = (effective_weight(build(name, weight, statistics)) for name in ("qera-exact", "qera-approx"))
    assert torch.allclose(exact, approx, atol=1e-5)


def test_l2qer_looks_at_relative_sizes_only_and_raises_tiny_ones() -> None:
    weight, mean_abs = torch.randn(48, 64), torch.rand(64, dtype=torch.float64) + 0.1
    mean_abs[7] = 0
    floor = mean_abs.clone()
    floor[7] = 1e-4
    restored, same = (
        effective_weight(build("l2qer", weight, InputStatistics(10, mean_abs=values))) for values in (mean_abs, floor)
    )
    assert torch.equal(restored, same)
    larger = effective_weight(build("l2qer", weight, InputStatistics(10, mean_abs=floor * 1000)))
    assert torch.allclose(larger, restored, atol=1e-5)


@pytest.mark.parametrize("method", ["zeroquant-v2", "lqer"])
def test_the_plain_svd_shares_the_singular_values_between_its_factors(method: str) -> None:
    """Up to a power of two, which costs no digits."""
    weight = torch.randn(48, 64)
    error = (weight - dequantize(quantize(weight))).double()
    singular_values = torch.linalg.svdvals(error)[:8]
    correction = build(method, weight, InputStatistics(0)).correction
    assert correction is not None
    up, down = correction.lora_up.double().norm(dim=0), correction.lora_down.double().norm(dim=1)
    assert torch.allclose(up * down, singular_values, rtol=1e-5)
    assert (up / down).log2().abs().max() <= 2


def test_output_gradients_lower_the_estimated_loss_of_the_network_and_raise_the_output_error() -> None:
    """tr(D E R E^T) is what a quadratic model of the loss with a Kronecker-factored Hessian expects."""
    x = correlated_inputs(400)
    gradient = torch.randn(400, 48, dtype=torch.float64) * torch.logspace(0, -2, 48, dtype=torch.float64)
    case = Case(torch.randn(48, 64), all_statistics(x, gradient))
    plain = remaining_error(case, config_of("qera-exact"))
    aimed = remaining_error(case, config_of("qera-exact", use_output_gradient=True))

    def estimated_loss(error: Tensor) -> float:
        return float(((gradient.square().mean(0).sqrt()[:, None] * error) @ x.T).square().sum())

    assert estimated_loss(aimed) < 0.9 * estimated_loss(plain)
    assert float((x @ aimed.T).norm()) > float((x @ plain.T).norm())


def test_gradients_are_required_only_by_the_option_that_uses_them() -> None:
    plain, aimed = (get_reconstructor(config_of("qera-exact", use_output_gradient=given)) for given in (False, True))
    assert plain.requires == {Statistic.AUTOCORRELATION}
    assert aimed.requires == {Statistic.AUTOCORRELATION, Statistic.OUTPUT_GRADIENT}


def test_an_output_that_hardly_has_a_gradient_counts_as_a_thousandth_of_the_mean() -> None:
    case = Case(torch.randn(48, 64), all_statistics(correlated_inputs(400), torch.ones(400, 48, dtype=torch.float64)))
    gradient = torch.ones(48, dtype=torch.float64)
    gradient[5] = 0
    floor = gradient.clone()
    floor[5] = gradient.mean() / 1000
    given, same = (
        remaining_error(
            Case(case.weight, replace(case.statistics, output_gradient=values)),
            config_of("qera-exact", use_output_gradient=True),
        )
        for values in (gradient, floor)
    )
    assert torch.allclose(given, same, atol=1e-6)


def test_an_autocorrelation_that_is_not_symmetric_is_refused() -> None:
    statistics = statistics_of(correlated_inputs(300))
    skewed = statistics.autocorrelation.clone()
    skewed[3, 40] += skewed.diagonal().max()
    with pytest.raises(CalibrationError, match="autocorrelation is not symmetric"):
        build("qera-exact", torch.randn(48, 64), replace(statistics, autocorrelation=skewed))


def test_a_float32_autocorrelation_serves_as_well() -> None:
    weight, statistics = torch.randn(48, 64), statistics_of(correlated_inputs(300))
    single = replace(statistics, autocorrelation=statistics.autocorrelation.float())
    errors = [layer_errors(weight, build("qera-exact", weight, given), statistics) for given in (statistics, single)]
    assert errors[1].output_after == pytest.approx(errors[0].output_after, rel=1e-4)


@pytest.mark.parametrize("method", ["none", "lqer", "qera-exact"])
def test_reported_errors_are_those_of_the_weights_and_of_the_outputs_on_the_tokens(method: str) -> None:
    weight, x = torch.randn(48, 64), correlated_inputs(300)
    weights = build(method, weight, statistics_of(x))
    errors = layer_errors(weight, weights, statistics_of(x))
    dense = weight.double()
    for after, restored in ((False, dequantize(weights.quantized).double()), (True, effective_weight(weights))):
        difference = dense - restored
        weight_error = float(difference.norm() / dense.norm())
        output_error = float((x @ difference.T).norm() / (x @ dense.T).norm())
        assert (errors.weight_after if after else errors.weight_before) == pytest.approx(weight_error, rel=1e-9)
        assert (errors.output_after if after else errors.output_before) == pytest.approx(output_error, rel=1e-6)


def test_the_output_error_falls_back_to_mean_squares_and_is_absent_without_statistics() -> None:
    weight, statistics = torch.randn(48, 64), statistics_of(correlated_inputs(300))
    weights = build("lqer", weight, statistics)
    diagonal = layer_errors(weight, weights, InputStatistics(300, mean_square=statistics.mean_square))
    full = layer_errors(weight, weights, InputStatistics(300, autocorrelation=statistics.mean_square.diag()))
    assert diagonal.output_after == pytest.approx(full.output_after, rel=1e-12)
    nothing = layer_errors(weight, weights, InputStatistics(0))
    assert nothing.output_before is None
    assert nothing.output_after is None


def test_a_layer_without_error_or_without_output_is_reported_as_such() -> None:
    zero = torch.zeros(48, 64)
    exact = layer_errors(zero, LinearWeights(quantize(zero)), InputStatistics(1))
    assert exact.weight_before == 0
    spoiled = LinearWeights(quantize(torch.randn(48, 64)))
    assert layer_errors(zero, spoiled, InputStatistics(1)).weight_before == float("inf")


def test_losses_of_many_rows_do_not_depend_on_how_they_are_cut() -> None:
    rows, weighting = torch.randn(2500, 8), statistics_of(torch.randn(50, 8, dtype=torch.float64)).autocorrelation
    expected = sum(float(row.double() @ weighting @ row.double()) for row in rows)
    assert weighted_square(rows, weighting) == pytest.approx(expected, rel=1e-9)


def test_the_effective_weight_applies_scale_order_and_single_factor() -> None:
    """Column by column: feed unit vectors through the definition of a layer."""
    weights = LinearWeights(
        quantize(torch.randn(16, 32)),
        Correction(torch.randn(16, 4), None),
        input_scale=torch.rand(32) + 0.5,
        channel_order=torch.randperm(32).int(),
    )
    codes = dequantize(weights.quantized).double()
    columns = []
    for channel in range(32):
        x = torch.zeros(32, dtype=torch.float64)
        x[channel] = 1 / float(weights.input_scale[channel])
        x = x[weights.channel_order.long()]
        columns.append(codes @ x + weights.correction.lora_up.double() @ x[:4])
    assert torch.allclose(effective_weight(weights), torch.stack(columns, 1), atol=1e-12)
