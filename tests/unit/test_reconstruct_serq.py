"""SERQ: the order of channels, both stages of the salient ones, and what the layer then computes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.errors import CalibrationError, SchemeError
from models.quant.grid import dense_factors, dequantize
from models.reconstruct import get_reconstructor
from models.reconstruct.base import permute_statistics
from models.reconstruct.loss import effective_weight
from models.types import InputStatistics
from tests.support.reconstruct_cases import (
    Case,
    all_statistics,
    build,
    config_of,
    correlated_inputs,
    make_case,
    quantize,
    without,
)  # fmt: skip


def channel_order(case: Case, **options: str) -> Tensor | None:
    return get_reconstructor(config_of("serq", 32, "int4", **options)).channel_order(case.weight, case.statistics)


def test_channels_come_by_falling_absmax_and_ties_as_they_are() -> None:
    case = make_case("healthy")
    absmax = torch.tensor([1.0, 5.0, 2.0, 5.0] * 16, dtype=torch.float64)
    order = channel_order(without(case, absmax=absmax))
    assert order is not None
    assert order.dtype == torch.int32
    assert order.tolist() == sorted(range(64), key=lambda channel: (-float(absmax[channel]), channel))


def test_what_flattening_divided_by_goes_before_the_magnitudes_that_are_left() -> None:
    case = make_case("healthy")
    flattening = torch.rand(64, dtype=torch.float64) + 0.1
    order = channel_order(without(case, flattening=flattening, absmax=torch.ones(64)))
    assert order is not None
    assert torch.equal(order.long(), flattening.argsort(descending=True))


def test_channels_that_are_in_order_already_are_left_alone() -> None:
    case = make_case("healthy")
    assert channel_order(without(case, absmax=torch.linspace(2, 1, 64))) is None
    assert channel_order(without(case, absmax=torch.ones(64))) is None


def test_saliency_by_output_error_chooses_by_energy_and_orders_by_scale() -> None:
    case = make_case("healthy")
    quietest = int(case.statistics.absmax.argmin())
    case.weight[:, quietest] *= 1e4
    order = channel_order(case, saliency="output-error")
    assert order is not None
    energy = [float(case.statistics.mean_square[c] * case.weight[:, c].double().square().sum()) for c in range(64)]
    by_scale = sorted(range(64), key=lambda channel: -float(case.statistics.absmax[channel]))
    salient = sorted(range(64), key=lambda channel: -energy[channel])[:32]
    assert int(order[31]) == quietest
    assert order.tolist() == [c for c in by_scale if c in salient] + [c for c in by_scale if c not in salient]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_an_unusable_flattening_is_named(bad: float) -> None:
    case = make_case("healthy")
    flattening = torch.ones(64, dtype=torch.float64)
    flattening[3] = bad
    with pytest.raises(CalibrationError, match="flattening"):
        channel_order(without(case, flattening=flattening))


def test_salient_weights_are_rounded_to_four_bits_and_what_that_misses_is_quantized_with_the_rest() -> None:
    case = make_case("tall")
    weights, ordered = build(case, config_of("serq", 32, "int4"))
    weight = ordered.weight.double()
    side = torch.zeros_like(weight)
    for row in range(96):
        scale = float((weight[row, :32].abs().max() / 7).half())
        for channel in range(32):
            side[row, channel] = scale * max(-8, min(7, round(float(weight[row, channel]) / scale)))
    assert weights.correction is not None
    assert torch.allclose(dense_factors(weights.correction)[0].double(), side[:, :32], atol=1e-7)
    expected = quantize((weight - side).float())
    assert torch.equal(weights.quantized.codes, expected.codes)


@pytest.mark.parametrize("factor_dtype", ["int4", "int8", "bfloat16"])
def test_salient_channels_keep_a_fraction_of_the_error_of_one_stage(factor_dtype: str) -> None:
    case = make_case("tall")
    weights, ordered = build(case, config_of("serq", 32, factor_dtype))
    plain = ordered.weight - dequantize(quantize(ordered.weight))
    assert weights.correction is not None
    side, _ = dense_factors(weights.correction)
    left = ordered.weight - dequantize(weights.quantized)
    left[:, :32] -= side
    assert left[:, :32].norm() < 0.2 * plain[:, :32].norm()
    assert torch.equal(left[:, 32:], plain[:, 32:])


def test_the_layer_computes_the_dense_product_from_inputs_as_they_come() -> None:
    """With the order recorded, as a build does, columns are back where the unordered inputs meet them."""
    case = make_case("tall")
    config = config_of("serq", 32, "int4")
    order = get_reconstructor(config).channel_order(case.weight, case.statistics)
    weights, _ = build(case, config)
    x = correlated_inputs(50)
    assert weights.correction is not None
    gathered = x[:, order.long()]
    side, _ = dense_factors(weights.correction)
    product = gathered @ dequantize(weights.quantized).double().T + gathered[:, :32] @ side.double().T
    assert torch.allclose(product, x @ effective_weight(replace(weights, channel_order=order)).T, atol=1e-9)
    one_stage = x @ dequantize(quantize(case.weight)).double().T
    dense = x @ case.weight.double().T
    assert (product - dense).norm() < (one_stage - dense).norm()


def test_more_salient_channels_than_inputs_are_refused_by_layer() -> None:
    reconstructor = get_reconstructor(config_of("serq", 128, "int4"))
    reconstructor.check(48, 128, "model.layers.0.mlp.up_proj")
    with pytest.raises(
        SchemeError, match=r"model\.layers\.2\.mlp\.up_proj: rank 128.* 64 input channels; .* at most 64"
    ):
        reconstructor.check(256, 64, "model.layers.2.mlp.up_proj")


def test_every_statistic_follows_the_channels() -> None:
    x, gradient = correlated_inputs(100), torch.randn(100, 48, dtype=torch.float64)
    order = torch.randperm(64).int()
    statistics = replace(all_statistics(x, gradient), flattening=torch.rand(64))
    given, expected = permute_statistics(statistics, order), all_statistics(x[:, order.long()], gradient)
    assert torch.equal(given.flattening, statistics.flattening[order.long()])
    for name in (field for field in InputStatistics.__dataclass_fields__ if field not in ("flattening", "num_tokens")):
        assert torch.allclose(getattr(given, name), getattr(expected, name), rtol=1e-9, atol=1e-12), name
    assert given.num_tokens == 100


def test_statistics_that_were_not_collected_stay_away_and_wrong_ones_are_named() -> None:
    order = torch.arange(63, -1, -1)
    assert permute_statistics(InputStatistics(3), order) == InputStatistics(3)
    with pytest.raises(CalibrationError, match=r"mean_abs has shape \(63,\); expected 64"):
        permute_statistics(InputStatistics(3, mean_abs=torch.ones(63)), order)
