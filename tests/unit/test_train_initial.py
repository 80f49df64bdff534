"""What trainable layers start as: the base itself, or a merge that loses less in every channel that it touches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import CalibrationError
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.reconstruct.merge import round_shift
from models.reconstruct.qer import Qer
from models.scheme import QuantScheme
from models.train.codes import InsideRounding, IntegerFactors, TrainableCodes
from models.train.initial import BuiltLinear, trainable_codes, trainable_linear
from models.types import InputStatistics, LinearWeights, QuantizedWeight
from tests.support.qer_cases import OFF, SCHEMES, input_statistics, off_grid_layer, qer, whole

INTEGER = ["fixed-point", "shift", "direct", "ternary"]
FROM_QERA = ["fixed-point", "shift", "direct"]
IN = 64
RANK = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank_error(scheme: QuantScheme, size: float = 1.5) -> tuple[Tensor, QuantizedWeight]:
    """A weight whose codes miss it by rank 2, up to ``size`` levels: what factors are made to mend."""
    _, quantized = off_grid_layer(scheme, (16, IN))
    levels = quantized.scale.float().repeat_interleave(scheme.group_length(IN), 1)
    missed = torch.randn(16, 2) @ torch.randn(2, IN)
    missed[::4] = 0
    return dequantize(quantized) + missed / missed.abs().max() * size * levels, quantized


def started(
    method: Qer, weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics, seed: int = 0
) -> IntegerFactors:
    codes = trainable_codes(method, weight, quantized, statistics, generator(seed))
    assert isinstance(codes, IntegerFactors)
    return codes


def losses(weight: Tensor, quantized: QuantizedWeight, statistics: InputStatistics) -> Tensor:
    """Mean square of each output's error over the inputs, float64, from the dequantized weight."""
    error = weight.double() - dequantize(quantized).double()
    assert statistics.autocorrelation is not None
    return torch.stack([row @ statistics.autocorrelation @ row for row in error])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("merge", INTEGER)
def test_a_random_start_is_exactly_the_base_with_one_factor_to_learn_from(merge: str, scheme: QuantScheme) -> None:
    weight, quantized = off_grid_layer(scheme)
    factors = started(qer(merge, RANK), weight, quantized, input_statistics(IN))
    assert torch.equal(factors.merged(), quantized.codes)
    assert torch.equal(whole(factors)[0], quantized.codes.float())
    largest = qer(merge).options.largest_factor(scheme.num_bits)
    assert 0.5 * largest < float(factors.lora_up.detach().abs().max()) <= largest
    assert not factors.lora_down.any()
    assert torch.equal(factors.shift, torch.full((12, 1), qer(merge).options.shift_of(RANK, scheme.num_bits)).int())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_float_factors_start_at_a_product_of_nothing(scheme: QuantScheme) -> None:
    weight, quantized = off_grid_layer(scheme)
    inside = trainable_codes(qer("inside-rounding", RANK), weight, quantized, input_statistics(IN), generator())
    assert isinstance(inside, InsideRounding)
    assert torch.equal(inside.merged(), quantized.codes)
    assert not inside.lora_up.any() and inside.lora_down.any()


def test_the_same_generator_gives_the_same_start_and_the_global_one_plays_no_part() -> None:
    weight, quantized = off_grid_layer(SCHEMES[0])
    statistics = input_statistics(IN)
    first = started(qer(rank=RANK), weight, quantized, statistics)
    torch.randn(7)
    second, other = (started(qer(rank=RANK), weight, quantized, statistics, seed) for seed in (0, 1))
    assert torch.equal(first.lora_up, second.lora_up)
    assert not torch.equal(first.lora_up, other.lora_up)


def merged_losses(codes: TrainableCodes, weight: Tensor, base: QuantizedWeight, statistics: InputStatistics) -> Tensor:
    return losses(weight, replace(base, codes=codes.merged()), statistics)


@pytest.mark.parametrize("scheme", [*SCHEMES, QuantScheme(4, 16)], ids=str)
@pytest.mark.parametrize("merge", FROM_QERA)
@pytest.mark.parametrize("is_low_rank", [True, False])
def test_a_start_from_qera_never_loses_more_than_the_base_in_any_output_channel(
    merge: str, scheme: QuantScheme, is_low_rank: bool
) -> None:
    weight, quantized = low_rank_error(scheme) if is_low_rank else off_grid_layer(scheme, (16, IN))
    # Groups of very different steps: what a level is worth counts.
    scale = (quantized.scale * torch.logspace(-1, 1, quantized.scale.numel()).reshape(quantized.scale.shape)).half()
    statistics = input_statistics(IN)
    for base in (quantized, replace(quantized, scale=scale)):
        dense = weight if base is quantized else weight - dequantize(quantized) + dequantize(base)
        factors = started(qer(merge, RANK, initialization="qera"), dense, base, statistics)
        before, after = losses(dense, base, statistics), merged_losses(factors, dense, base, statistics)
        assert bool((after <= before * (1 + 1e-9)).all())
        is_off = factors.shift[:, 0] == OFF
        assert torch.equal(factors.merged()[is_off], base.codes[is_off])
        if factors.lora_down.any():
            assert bool((after[~is_off] < before[~is_off]).all())
        assert torch.equal(whole(factors)[0], factors.merged().float())


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_a_start_from_qera_mends_a_low_rank_error_and_leaves_channels_without_one_off(scheme: QuantScheme) -> None:
    weight, quantized = low_rank_error(scheme, 3.0)
    statistics = input_statistics(IN)
    factors = started(qer("shift", RANK, initialization="qera", factor_bits=8), weight, quantized, statistics)
    before, after = losses(weight, quantized, statistics), merged_losses(factors, weight, quantized, statistics)
    has_error = torch.arange(16) % 4 != 0
    assert float(after[has_error].sum()) < 0.5 * float(before[has_error].sum())
    assert (factors.shift[::4, 0] == OFF).all()
    assert (factors.shift[has_error, 0] < OFF).any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("merge", FROM_QERA)
def test_a_start_from_qera_takes_something_off_what_rounding_to_nearest_loses(merge: str, scheme: QuantScheme) -> None:
    weight, statistics = torch.randn(48, IN) * 0.05, input_statistics(IN)
    quantized = quantize_rtn(weight, scheme)
    factors = started(qer(merge, 8, initialization="qera"), weight, quantized, statistics)
    before, after = losses(weight, quantized, statistics), merged_losses(factors, weight, quantized, statistics)
    assert float(after.sum()) < 0.99 * float(before.sum())


@pytest.mark.parametrize("merge", FROM_QERA)
def test_where_no_channel_gains_it_is_a_random_start(merge: str) -> None:
    scheme = QuantScheme(4, 32)
    weight = torch.randn(16, IN)
    quantized = quantize_rtn(weight, scheme)
    exact = dequantize(quantized)
    factors = started(qer(merge, RANK, initialization="qera"), exact, quantized, input_statistics(IN))
    assert torch.equal(factors.merged(), quantized.codes)
    assert factors.lora_up.any() and not factors.lora_down.any()
    assert (factors.shift == qer(merge).options.shift_of(RANK, 4)).all()


def test_merge_shift_tries_every_shift_per_channel_unless_one_is_given() -> None:
    weight, statistics = torch.randn(48, IN) * 0.05, input_statistics(IN)
    quantized = quantize_rtn(weight, SCHEMES[0])
    factors = started(qer("shift", 16, initialization="qera", factor_bits=8), weight, quantized, statistics)
    assert int(factors.shift[factors.shift < OFF].amax()) > 15
    product = factors.lora_up.detach().round() @ factors.lora_down.detach().round()
    chosen = merged_losses(factors, weight, quantized, statistics)
    for shift in range(19):
        codes = (quantized.codes + round_shift(product.int(), shift)).clamp(0, 15).to(torch.uint8)
        other = losses(weight, replace(quantized, codes=codes), statistics)
        assert bool((chosen <= other * (1 + 1e-9)).all())
    # So fine a step moves no weight by a level, and others are not asked for: the start is a random one.
    given = started(qer("shift", 4, initialization="qera", shift=20), weight, quantized, statistics)
    assert set(given.shift.flatten().tolist()) == {20}


@pytest.mark.parametrize("merge", FROM_QERA)
def test_latents_of_a_start_from_qera_stay_within_their_integers(merge: str) -> None:
    weight, quantized = low_rank_error(SCHEMES[0], 6.0)
    factors = started(qer(merge, RANK, initialization="qera"), weight, quantized, input_statistics(IN))
    assert max(float(latents.detach().abs().max()) for latents in factors.parameters()) <= 7


def test_dead_inputs_and_ranks_beyond_that_of_the_error_are_no_trouble() -> None:
    weight, quantized = low_rank_error(SCHEMES[0])
    statistics = input_statistics(IN)
    assert statistics.autocorrelation is not None
    statistics.autocorrelation[:, 5] = 0
    statistics.autocorrelation[5] = 0
    factors = started(qer(rank=16, initialization="qera"), weight, quantized, statistics)
    assert all(latents.isfinite().all() for latents in factors.parameters())
    nothing = replace(statistics, autocorrelation=torch.zeros(IN, IN, dtype=torch.float64))
    assert torch.equal(
        started(qer(rank=16, initialization="qera"), weight, quantized, nothing).merged(), quantized.codes
    )


@pytest.mark.parametrize(("name", "initialization"), [("mean_square", "random"), ("autocorrelation", "qera")])
def test_a_statistic_that_is_missing_or_broken_is_named(name: str, initialization: str) -> None:
    weight, quantized = low_rank_error(SCHEMES[0])
    good = getattr(input_statistics(IN), name)
    broken = good.clone()
    broken.view(-1)[3] = float("nan")
    method = qer(rank=RANK, initialization=initialization)
    for values in (None, broken, good[:-1]):
        bad: dict[str, Any] = {name: values}
        statistics = replace(input_statistics(IN), **bad)
        built = BuiltLinear(weight, LinearWeights(quantized), statistics, lambda w: quantize_rtn(w, SCHEMES[0]))
        with pytest.raises(CalibrationError, match=name):
            trainable_linear(method, built, None, generator=generator(), precision=torch.float32)
