"""The base quantizers behind their protocol: what they ask for, what they refuse, what they share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import QuantizerConfig
from models.errors import CalibrationError, SchemeError
from models.quant import quantizers
from models.quant.clip import search_grid
from models.quant.gptq import factorize, quantize_gptq
from models.quant.grid import quantize
from models.quant.quantizers import get_quantizer
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.types import InputStatistics, QuantizedWeight, Statistic

SCHEME = QuantScheme(4, 32)
RTN = QuantizerConfig()
CLIP = QuantizerConfig(use_clip_search=True)
GPTQ = QuantizerConfig("gptq")
ALL = [RTN, CLIP, GPTQ, QuantizerConfig("gptq", use_clip_search=True, use_act_order=True)]


def autocorrelation(num_channels: int = 64) -> Tensor:
    inputs = torch.randn(300, num_channels, dtype=torch.float64) @ torch.randn(num_channels, num_channels).double()
    return inputs.T @ inputs / 300


def statistics(**given: Any) -> InputStatistics:
    return InputStatistics(num_tokens=300, **given)


def same(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    assert first.zero_point is not None
    assert second.zero_point is not None
    return all(
        torch.equal(a, b)
        for a, b in zip(
            (first.codes, first.scale, first.zero_point), (second.codes, second.scale, second.zero_point), strict=True
        )
    )


def test_each_asks_for_the_statistics_that_it_uses_and_no_other() -> None:
    expected = [set(), {Statistic.MEAN_SQUARE}, {Statistic.AUTOCORRELATION}, {Statistic.AUTOCORRELATION}]
    assert [set(get_quantizer(config, SCHEME).requires) for config in ALL] == expected


def test_rounding_needs_no_statistics() -> None:
    weight = torch.randn(8, 64)
    assert same(get_quantizer(RTN, SCHEME).bind(InputStatistics(0))(weight), quantize_rtn(weight, SCHEME))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_rounds_to_the_searched_grid(dtype: torch.dtype) -> None:
    weight, mean_square = torch.randn(8, 64, dtype=dtype), torch.rand(64, dtype=torch.float64)
    expected = quantize(weight.float(), *search_grid(weight.float(), SCHEME, mean_square), SCHEME)
    assert same(get_quantizer(CLIP, SCHEME).bind(statistics(mean_square=mean_square))(weight), expected)


def test_the_diagonal_of_the_autocorrelation_stands_in_for_mean_squares() -> None:
    weight, matrix = torch.randn(8, 64), autocorrelation()
    quantizer = get_quantizer(CLIP, SCHEME)
    given = quantizer.bind(statistics(mean_square=matrix.diagonal().clone()))(weight)
    assert same(quantizer.bind(statistics(autocorrelation=matrix))(weight), given)


@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("use_act_order", [False, True])
@pytest.mark.parametrize("use_clip_search", [False, True])
def test_every_option_of_gptq_is_carried_out(damping: float, use_act_order: bool, use_clip_search: bool) -> None:
    weight, matrix = torch.randn(8, 64), autocorrelation()
    config = QuantizerConfig("gptq", use_clip_search, use_act_order, damping)
    factor = factorize(matrix, damping, use_act_order=use_act_order)
    expected = quantize_gptq(weight, SCHEME, factor, use_clip_search=use_clip_search)
    assert same(get_quantizer(config, SCHEME).bind(statistics(autocorrelation=matrix))(weight), expected)


def test_weights_that_share_an_input_share_one_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return factorize(*args, **options)

    monkeypatch.setattr(quantizers, "factorize", counting)
    bound = get_quantizer(GPTQ, SCHEME).bind(statistics(autocorrelation=autocorrelation()))
    assert not calls
    first, _, again = bound(weight := torch.randn(8, 64)), bound(torch.randn(16, 64)), bound(weight)
    assert len(calls) == 1
    assert same(first, again)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_row_that_the_groups_do_not_tile_is_refused_beforehand(config: QuantizerConfig) -> None:
    quantizer = get_quantizer(config, QuantScheme(4, 64))
    quantizer.check(128, "layer.q_proj")
    with pytest.raises(SchemeError, match=r"layer\.q_proj: group_size 64 does not divide its 96 input channels"):
        quantizer.check(96, "layer.q_proj")


@pytest.mark.parametrize(("config", "name"), [(CLIP, "mean_square"), (GPTQ, "autocorrelation")], ids=str)
def test_a_missing_statistic_is_named_with_what_to_do(config: QuantizerConfig, name: str) -> None:
    with pytest.raises(CalibrationError, match=f"statistic {name}, which was not collected: calibrate .* or choose"):
        get_quantizer(config, SCHEME).bind(InputStatistics(0))


def test_gptq_does_not_make_do_with_mean_squares() -> None:
    with pytest.raises(CalibrationError, match="autocorrelation"):
        get_quantizer(GPTQ, SCHEME).bind(statistics(mean_square=torch.ones(64, dtype=torch.float64)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_statistic_that_is_not_finite_is_refused(value: float) -> None:
    matrix = autocorrelation()
    matrix[3, 5] = value
    with pytest.raises(CalibrationError, match="autocorrelation is not finite"):
        get_quantizer(GPTQ, SCHEME).bind(statistics(autocorrelation=matrix))
    with pytest.raises(CalibrationError, match="mean_square is not finite"):
        get_quantizer(CLIP, SCHEME).bind(statistics(mean_square=matrix[3]))


def test_a_negative_square_is_refused() -> None:
    with pytest.raises(CalibrationError, match="mean_square has a negative entry"):
        get_quantizer(CLIP, SCHEME).bind(statistics(mean_square=-torch.ones(64, dtype=torch.float64)))
    with pytest.raises(CalibrationError, match="autocorrelation has a negative entry"):
        get_quantizer(GPTQ, SCHEME).bind(statistics(autocorrelation=-autocorrelation()))


def test_an_autocorrelation_that_is_not_square_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"autocorrelation is not square but of shape \(32, 64\)"):
        get_quantizer(GPTQ, SCHEME).bind(statistics(autocorrelation=autocorrelation()[:32]))


@pytest.mark.parametrize("config", [CLIP, GPTQ], ids=str)
def test_statistics_of_another_width_are_refused(config: QuantizerConfig) -> None:
    bound = get_quantizer(config, SCHEME).bind(statistics(autocorrelation=autocorrelation()))
    with pytest.raises(CalibrationError, match="is of 64 input channels, the weight has 128"):
        bound(torch.randn(4, 128))


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_weight_that_the_scheme_cannot_hold_is_refused(config: QuantizerConfig) -> None:
    bound = get_quantizer(config, SCHEME).bind(statistics(autocorrelation=autocorrelation()))
    with pytest.raises(SchemeError, match="floating-point matrix"):
        bound(torch.ones(4, 64, dtype=torch.int32))
    with pytest.raises(SchemeError, match="holds inf"):
        bound(torch.full((4, 64), float("inf")))
