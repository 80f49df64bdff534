"""Predicted losses against what comes out: matrix formulas, and layers really quantized and corrected."""

from dataclasses import replace

import pytest
import torch

from models.budget import layer_choices
from models.budget.losses import LossModel
from models.budget.spectra import (
    compensated_error,
    diagonal_loss,
    losses_by_channels,
    losses_by_rank,
    reweighted,
    rounding_error,
)
from models.config import BudgetConfig, BuildConfig, QuantizerConfig, ReconstructConfig
from models.llama.config import LinearShape
from models.quant.gptq import factorize, quantize_gptq
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.reconstruct import get_reconstructor
from models.reconstruct.linalg import weighted_low_rank
from models.reconstruct.loss import effective_weight
from models.scheme import QuantScheme
from models.types import InputStatistics

ROWS, COLUMNS = 48, 64
SCHEME = QuantScheme(4, 32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def autocorrelation():
    """Correlated channels of very different sizes."""
    x = randn(400, COLUMNS, seed=1) @ (torch.eye(COLUMNS, dtype=torch.float64) + 0.15 * randn(COLUMNS, COLUMNS, seed=2))
    x = x * torch.linspace(0.2, 4, COLUMNS, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.fixture
def weight():
    return randn(ROWS, COLUMNS, seed=3).float()


@pytest.fixture
def output_gradient():
    return torch.logspace(-3, 1, ROWS, dtype=torch.float64)[
        torch.randperm(ROWS, generator=torch.Generator().manual_seed(4))
    ]


def loss_by_double_loop(error, autocorrelation, output_weighting):
    total = 0.0
    for row, weight_of_row in zip(error.tolist(), output_weighting.tolist(), strict=True):
        total += weight_of_row * sum(
            a * r * b
            for a, line in zip(row, autocorrelation.tolist(), strict=True)
            for r, b in zip(line, row, strict=True)
        )
    return total


@pytest.mark.parametrize("norm", ["outputs", "weight", "diagonal"])
def test_losses_of_a_correction_are_those_of_its_leading_components(autocorrelation, output_gradient, norm):
    error = randn(ROWS, COLUMNS, seed=5)
    weighting = {"outputs": autocorrelation, "weight": None, "diagonal": autocorrelation.diagonal()}[norm]
    up, down = weighted_low_rank(error, weighting, 6)
    losses = losses_by_rank(error, up, down, autocorrelation, output_gradient)
    for rank in (0, 1, 4, 6):
        left = error - up[:, :rank] @ down[:rank]
        assert losses[rank].item() == pytest.approx(
            loss_by_double_loop(left, autocorrelation, output_gradient), rel=1e-9
        )


def test_in_the_norm_of_the_loss_they_are_the_remaining_singular_values(autocorrelation, output_gradient):
    error = randn(ROWS, COLUMNS, seed=5)
    up, down = weighted_low_rank(error, autocorrelation, 8, output_gradient)
    losses = losses_by_rank(error, up, down, autocorrelation, output_gradient)
    values, vectors = torch.linalg.eigh(autocorrelation)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    energies = torch.linalg.svdvals(output_gradient.sqrt()[:, None] * error @ root).square()
    expected = energies.sum() - torch.nn.functional.pad(energies[:8].cumsum(0), (1, 0))
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-8 * float(energies.sum()))


def test_losses_of_whole_channels_are_those_of_the_others(autocorrelation, output_gradient):
    error = randn(ROWS, COLUMNS, seed=6)
    for rank, loss in zip(
        [0, 5, COLUMNS], losses_by_channels(error, [0, 5, COLUMNS], autocorrelation, output_gradient), strict=True
    ):
        left = error.clone()
        left[:, :rank] = 0
        assert loss == pytest.approx(loss_by_double_loop(left, autocorrelation, output_gradient), rel=1e-9, abs=1e-12)


def test_rounding_error_is_what_rounding_misses(weight):
    assert rounding_error(weight, SCHEME).equal(weight - dequantize(quantize_rtn(weight, SCHEME)))


@pytest.mark.parametrize("use_act_order", [False, True])
def test_compensated_error_loses_what_the_pivots_say(weight, autocorrelation, use_act_order):
    """``tr(E H E^T) = sum_k D_k |n_k|^2``, whatever the rounding errors are."""
    damping = 0.01
    hessian = factorize(autocorrelation, damping, use_act_order=use_act_order)
    rounding = rounding_error(weight, SCHEME)
    damped = autocorrelation + damping * autocorrelation.diagonal().mean() * torch.eye(COLUMNS)
    error = compensated_error(rounding, hessian)
    pivots = torch.empty_like(hessian.pivots).index_copy_(0, hessian.order, hessian.pivots)
    lost = loss_by_double_loop(error, damped, torch.ones(ROWS))
    assert lost == pytest.approx(diagonal_loss(rounding, pivots), rel=1e-4)


@pytest.mark.parametrize("use_act_order", [False, True])
def test_feeding_gptqs_own_rounding_back_gives_gptqs_own_error(weight, autocorrelation, use_act_order):
    """The relation between both errors is exact: recover the rounding from GPTQ's codes and go back."""
    hessian = factorize(autocorrelation, 0.01, use_act_order=use_act_order)
    error = weight - dequantize(quantize_gptq(weight, SCHEME, hessian))
    rounding = torch.empty_like(error)
    rounding[:, hessian.order] = error[:, hessian.order] @ hessian.feedback.T
    assert rounding.square().mean() < 2 * rounding_error(weight, SCHEME).square().mean()
    torch.testing.assert_close(compensated_error(rounding, hessian), error, rtol=1e-4, atol=1e-5)


def statistics_of(autocorrelation, output_gradient=None):
    diagonal = autocorrelation.diagonal().clone()
    return InputStatistics(
        400,
        autocorrelation=autocorrelation,
        mean_square=diagonal,
        mean_abs=0.8 * diagonal.sqrt(),
        absmax=3 * diagonal.sqrt(),
        fisher_rows=torch.linspace(0.5, 2, ROWS, dtype=torch.float64),
        fisher_columns=torch.linspace(0.1, 3, COLUMNS, dtype=torch.float64),
        output_gradient=output_gradient,
    )


def predicted(config, weight, statistics, unit=1.0):
    shape = LinearShape(ROWS, COLUMNS, has_bias=False)
    options = LossModel(config, statistics).options(weight, statistics, layer_choices(config, "layer", shape), unit)
    return {(it.num_bits, it.rank): it.loss for it in options}


def measured(config, weight, statistics, num_bits, rank):
    scheme = replace(config.scheme, num_bits=num_bits)
    reconstructor = get_reconstructor(replace(config.reconstruct, rank=rank))
    if config.quantizer.method == "gptq":
        hessian = factorize(statistics.autocorrelation, config.quantizer.damping, use_act_order=False)
        weights = reconstructor.reconstruct(weight, statistics, lambda it: quantize_gptq(it, scheme, hessian))
    else:
        weights = reconstructor.reconstruct(weight, statistics, lambda it: quantize_rtn(it, scheme))
    return loss_by_double_loop(
        weight.double() - effective_weight(weights), statistics.autocorrelation, statistics.output_gradient
    )


@pytest.mark.parametrize("method", ["zeroquant-v2", "lqer", "l2qer", "qera-approx", "qera-exact"])
def test_over_rounding_the_loss_of_the_configured_width_is_predicted_exactly(
    weight, autocorrelation, output_gradient, method
):
    reconstruct = ReconstructConfig(method=method, rank=8, factor_dtype="float32")
    config = BuildConfig(scheme=SCHEME, reconstruct=reconstruct, budget=BudgetConfig(4.0, (4,), 8))
    statistics = statistics_of(autocorrelation, output_gradient)
    for (num_bits, rank), loss in predicted(config, weight, statistics).items():
        assert loss == pytest.approx(measured(config, weight, statistics, num_bits, rank), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize(("num_bits", "rank"), [(2, 0), (3, 0), (4, 8), (6, 0), (8, 4)])
def test_losses_of_other_widths_and_of_gptq_are_predicted_within_a_third(
    autocorrelation, output_gradient, quantizer, num_bits, rank
):
    weight = randn(ROWS, COLUMNS, seed=9).float()
    config = BuildConfig(
        scheme=SCHEME,
        quantizer=QuantizerConfig(quantizer),
        reconstruct=ReconstructConfig(factor_dtype="float32"),
        budget=BudgetConfig(4.0, (2, 3, 4, 6, 8), 8),
    )
    statistics = statistics_of(autocorrelation, torch.ones_like(output_gradient))
    loss = predicted(config, weight, statistics)[num_bits, rank]
    assert loss == pytest.approx(measured(config, weight, statistics, num_bits, rank), rel=0.35)


def test_each_bit_is_worth_about_a_factor_of_four(weight, autocorrelation):
    config = BuildConfig(scheme=SCHEME, budget=BudgetConfig(4.0, (3, 4, 5, 6), 0))
    losses = predicted(config, weight, statistics_of(autocorrelation))
    for width in (3, 4, 5):
        assert 3.0 < losses[width, 0] / losses[width + 1, 0] < 6.5


def test_without_a_unit_losses_are_relative_to_the_output_of_the_layer(weight, autocorrelation):
    config = BuildConfig(scheme=SCHEME, reconstruct=ReconstructConfig("none"))
    statistics = statistics_of(autocorrelation)
    error = rounding_error(weight, SCHEME).double()
    relative = loss_by_double_loop(error, autocorrelation, torch.ones(ROWS)) / loss_by_double_loop(
        weight.double(), autocorrelation, torch.ones(ROWS)
    )
    assert predicted(config, weight, statistics, unit=None)[4, 0] == pytest.approx(relative, rel=1e-6)


def test_clip_search_lowers_the_prediction_as_it_lowers_the_loss(autocorrelation, output_gradient):
    weight = randn(ROWS, COLUMNS, seed=11).float() ** 3
    statistics = statistics_of(autocorrelation, output_gradient)
    config = BuildConfig(scheme=QuantScheme(2, 32), reconstruct=ReconstructConfig("none"))
    clipped = replace(config, quantizer=QuantizerConfig(use_clip_search=True))
    assert predicted(clipped, weight, statistics)[2, 0] < 0.9 * predicted(config, weight, statistics)[2, 0]


def test_reweighting_sets_the_diagonal_and_keeps_correlations(autocorrelation):
    energy = torch.linspace(0.1, 5, COLUMNS, dtype=torch.float64)
    autocorrelation[7], autocorrelation[:, 7] = 0, 0
    scaled = reweighted(autocorrelation, energy)
    alive = [index for index in range(COLUMNS) if index != 7]
    torch.testing.assert_close(scaled.diagonal()[alive], energy[alive])
    assert not scaled[7].any()
    sizes, before = scaled.diagonal().sqrt(), autocorrelation.diagonal().sqrt()
    for i, j in ((0, 1), (5, 40), (63, 12)):
        assert (scaled[i, j] / sizes[i] / sizes[j]).item() == pytest.approx(
            (autocorrelation[i, j] / before[i] / before[j]).item()
        )


def test_channels_that_the_loss_does_not_feel_are_judged_by_what_it_feels(weight, autocorrelation, output_gradient):
    """One channel a hundred times larger than the rest, in tokens without gradients."""
    autocorrelation[3, :] *= 100
    autocorrelation[:, 3] *= 100
    energy = autocorrelation.diagonal().clone()
    energy[3] /= 1e4
    statistics = statistics_of(autocorrelation, output_gradient)
    config = BuildConfig(scheme=SCHEME, budget=BudgetConfig(4.0, (3, 4), 8))
    shape = LinearShape(ROWS, COLUMNS, has_bias=False)
    options = LossModel(config, statistics).options(
        weight, statistics, layer_choices(config, "layer", shape), 1.0, energy
    )
    scale = (energy / autocorrelation.diagonal()).sqrt()
    felt = replace(statistics, autocorrelation=autocorrelation * scale * scale[:, None])
    for option in options:
        if option.num_bits == 4:
            reconstructor = get_reconstructor(ReconstructConfig(rank=option.rank, factor_dtype="float32"))
            built = reconstructor.reconstruct(weight, statistics, lambda it: quantize_rtn(it, SCHEME))
            left = weight.double() - effective_weight(built)
            expected = loss_by_double_loop(left, felt.autocorrelation, output_gradient)
            assert option.loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["loftq", "lq-lora", "srr", "serq"])
def test_methods_that_change_the_weight_first_get_a_prediction_that_falls_with_the_rank(
    weight, autocorrelation, output_gradient, method
):
    config = BuildConfig(scheme=SCHEME, reconstruct=ReconstructConfig(method), budget=BudgetConfig(4.5, (4,), 16))
    losses = predicted(config, weight, statistics_of(autocorrelation, torch.ones_like(output_gradient)))
    assert losses[4, 16] < losses[4, 8] < losses[4, 0]


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_layer_that_is_zero_and_inputs_that_are_dead_lose_nothing(autocorrelation, quantizer):
    config = BuildConfig(scheme=SCHEME, quantizer=QuantizerConfig(quantizer), budget=BudgetConfig(4.5, (3, 4), 8))
    dead = autocorrelation.clone()
    dead[:, :40], dead[:40] = 0, 0
    zero = predicted(config, torch.zeros(ROWS, COLUMNS), statistics_of(autocorrelation), unit=None)
    assert set(zero.values()) == {0.0}
    unused = predicted(config, randn(ROWS, COLUMNS).float(), statistics_of(torch.zeros_like(dead)), unit=None)
    assert set(unused.values()) == {0.0}
    partly = predicted(config, randn(ROWS, COLUMNS).float(), statistics_of(dead), unit=None)
    assert all(0 <= loss < 1 for loss in partly.values())
