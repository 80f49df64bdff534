"""What method qer accepts, refuses by name before any weight is read, and chooses where it is left to."""

from typing import get_args

import pytest
import torch

from models.config import Option, ReconstructConfig
from models.errors import SchemeError
from models.quant.rtn import quantize_rtn
from models.reconstruct import get_reconstructor
from models.reconstruct.qer import INTEGER_MERGES, Merge, Qer, QerOptions
from models.scheme import QuantScheme
from models.types import InputStatistics, Statistic
from tests.support.qer_cases import qer

MERGES: tuple[str, ...] = get_args(Merge)
LAYER = "model.layers.1.self_attn.q_proj"


def test_the_registry_makes_it_with_rank_and_options() -> None:
    method = get_reconstructor(ReconstructConfig("qer", 6, options={"merge": "shift", "shift": 5, "use_clips": False}))
    assert isinstance(method, Qer)
    assert (method.method, method.rank) == ("qer", 6)
    assert method.options == QerOptions(merge="shift", shift=5, use_clips=False)


@pytest.mark.parametrize("merge", MERGES)
def test_every_member_of_the_family_can_be_chosen(merge: str) -> None:
    assert qer(merge).options.merge == merge


def test_what_it_requires_depends_on_the_initialization() -> None:
    assert qer().requires == {Statistic.MEAN_SQUARE}
    assert qer(initialization="qera").requires == {Statistic.MEAN_SQUARE, Statistic.AUTOCORRELATION}


def test_the_method_itself_makes_the_base_and_no_correction() -> None:
    weight = torch.randn(8, 32)
    scheme = QuantScheme(4, 32)
    made = qer().reconstruct(weight, InputStatistics(1), lambda matrix: quantize_rtn(matrix, scheme))
    assert torch.equal(made.quantized.codes, quantize_rtn(weight, scheme).codes)
    assert made.correction is None
    assert made.effective_bits == scheme.weight_bits(32)
    assert qer().channel_order(weight, InputStatistics(1)) is None


@pytest.mark.parametrize("merge", [merge for merge in MERGES if merge != "none"])
def test_factors_need_a_rank_of_one_or_more(merge: str) -> None:
    with pytest.raises(SchemeError, match="method qer needs a rank of 1 or more; merge=none trains"):
        qer(merge, rank=0)


def test_the_control_without_factors_takes_any_rank() -> None:
    for rank in (0, 4, 4096):
        qer("none", rank).check(16, 16, LAYER)
        qer("none", rank).check_scheme(QuantScheme(8, 32), LAYER)


def test_a_refit_is_refused() -> None:
    with pytest.raises(SchemeError, match="method qer leaves no correction to refit"):
        get_reconstructor(ReconstructConfig("qer", 4, refit=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "rounding"}, "options of method qer: merge: .*'fixed-point', 'shift', 'direct', 'ternary'"),
        ({"shift": 31}, "options of method qer: qer shift is 31; choose 0 to 30, or -1"),
        ({"shift": -2}, "options of method qer: qer shift is -2; choose 0 to 30, or -1"),
        ({"shift": 7.5}, "options of method qer: shift: .*valid integer"),
        ({"shift": True}, "options of method qer: shift: .*valid integer"),
        ({"merge": "direct", "shift": 3}, "qer shift is 3, but merge direct has none"),
        ({"fraction_bits": 0}, "qer fraction_bits is 0; choose 1 to 8"),
        ({"fraction_bits": 9}, "qer fraction_bits is 9; choose 1 to 8"),
        ({"factor_bits": 1}, "qer factor_bits is 1; choose 2 to 8, or 0"),
        ({"factor_bits": 9}, "qer factor_bits is 9; choose 2 to 8, or 0"),
        ({"factor_bits": -1}, "qer factor_bits is -1; choose 2 to 8, or 0"),
        ({"threshold": 0.0}, "qer threshold is 0.0; choose a share between 0 and 1"),
        ({"threshold": 1.0}, "qer threshold is 1.0; choose a share between 0 and 1"),
        ({"threshold": float("nan")}, "options of method qer: "),
        ({"initialization": "svd"}, "options of method qer: initialization: .*'random' or 'qera'"),
        ({"initialization": "qera", "merge": "ternary"}, "initialization qera is of merges .* not ternary"),
        ({"initialization": "qera", "merge": "inside-rounding"}, "initialization qera is of .* not inside-rounding"),
        ({"initialization": "qera", "merge": "requantize"}, "initialization qera is of .* not requantize"),
        ({"initialization": "qera", "merge": "none"}, "initialization qera is of .* not none"),
        ({"use_scales": 1}, "options of method qer: use_scales: .*valid boolean"),
        ({"use_clips": "no"}, "options of method qer: use_clips: .*valid boolean"),
        ({"inside_rounding": True}, "method qer has no option 'inside_rounding'; choose from merge, shift, fraction_"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Option], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        get_reconstructor(ReconstructConfig("qer", 4, options=options))


@pytest.mark.parametrize("merge", [merge for merge in MERGES if merge != "none"])
def test_a_rank_above_the_smaller_dimension_is_refused_by_layer(merge: str) -> None:
    qer(merge, 16).check(16, 64, LAYER)
    with pytest.raises(SchemeError, match=rf"{LAYER}: rank 17 .* 64 x 16 weight; choose at most 16"):
        qer(merge, 17).check(64, 16, LAYER)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(4, 32, format="mxint"), QuantScheme(4, 32, format="mxfp4"), QuantScheme(4, 32, format="nf4")],
    ids=str,
)
def test_formats_that_are_no_integer_grids_are_refused_by_layer(merge: str, scheme: QuantScheme) -> None:
    with pytest.raises(SchemeError, match=rf"{LAYER}: method qer .* {scheme.format} .*; choose format int"):
        qer(merge).check_scheme(scheme, LAYER)


@pytest.mark.parametrize("merge", MERGES)
def test_integer_grids_of_every_width_and_group_are_accepted(merge: str) -> None:
    for num_bits in range(2, 9):
        for group_size in (-1, 64):
            for is_symmetric in (False, True):
                qer(merge, 64).check_scheme(QuantScheme(num_bits, group_size, is_symmetric), LAYER)


@pytest.mark.parametrize("merge", sorted(INTEGER_MERGES - {"ternary"}))
def test_a_rank_whose_products_float32_may_round_is_refused_for_the_width_that_the_factors_have(merge: str) -> None:
    qer(merge, 1040).check_scheme(QuantScheme(8), LAYER)
    qer(merge, 1041).check_scheme(QuantScheme(4), LAYER)
    qer(merge, 1041, factor_bits=7).check_scheme(QuantScheme(8), LAYER)
    for method, scheme in ((qer(merge, 1041), QuantScheme(8)), (qer(merge, 1041, factor_bits=8), QuantScheme(4))):
        method.check(2048, 2048, LAYER)
        with pytest.raises(SchemeError, match=rf"{LAYER}: products of rank 1041 with factors up to 127"):
            method.check_scheme(scheme, LAYER)
    for exempt in ("ternary", "inside-rounding", "requantize"):
        qer(exempt, 1041).check_scheme(QuantScheme(8), LAYER)


def test_a_fixed_point_merge_that_would_leave_int32_is_refused_by_layer() -> None:
    qer(rank=1040, fraction_bits=8, shift=8).check_scheme(QuantScheme(8), LAYER)
    qer("shift", rank=1040, fraction_bits=8, shift=0).check_scheme(QuantScheme(8), LAYER)
    with pytest.raises(SchemeError, match=rf"{LAYER}: .* shifted left by 8, leave int32"):
        qer(rank=1040, fraction_bits=8, shift=0).check_scheme(QuantScheme(8), LAYER)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("factor_bits", [0, 2, 5, 8])
def test_factors_are_signed_integers_of_their_width_without_its_lowest(num_bits: int, factor_bits: int) -> None:
    width = factor_bits or num_bits
    assert qer(factor_bits=factor_bits).options.largest_factor(num_bits) == 2 ** (width - 1) - 1
    assert qer("ternary", factor_bits=factor_bits).options.largest_factor(num_bits) == 1


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("rank", [1, 4, 16, 50, 64])
def test_a_chosen_shift_brings_the_largest_product_to_a_few_levels(rank: int, num_bits: int) -> None:
    largest = rank * (2 ** (num_bits - 1) - 1) ** 2
    assert 1 <= largest / 2 ** qer("shift", rank).options.shift_of(rank, num_bits) < 2
    fixed = qer(rank=rank).options.shift_of(rank, num_bits)
    assert 4 <= largest / 2**fixed < 8 or fixed == 4  # the steps of the product are no coarser than the fraction
    assert qer("direct", rank).options.shift_of(rank, num_bits) == 0


@pytest.mark.parametrize("merge", ["fixed-point", "shift"])
def test_a_given_shift_is_taken(merge: str) -> None:
    for shift in (0, 3, 30):
        assert qer(merge, shift=shift).options.shift_of(16, 4) == shift
    assert qer("direct", shift=0).options.shift_of(16, 4) == 0
