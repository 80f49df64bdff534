"""What every reconstruction method must keep, over the whole registry and the options of its methods.

The loss that a method claims to minimise is written down here a second time, as the root S of the papers.
"""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from models.config import ReconstructConfig
from models.errors import CalibrationError, SchemeError
from models.quant.grid import dense_factors, dequantize
from models.reconstruct import RECONSTRUCTORS, get_reconstructor
from models.types import Correction, InputStatistics, QuantizedWeight, Statistic
from tests.support import reconstruct_cases
from tests.support.reconstruct_cases import CASES, Case, build, make_case, quantize, remaining_error

VARIANTS: dict[str, dict[str, int | bool | str]] = {
    **{method: {} for method in RECONSTRUCTORS if method != "qer"},  # leaves no correction; it has tests of its own
    "qera-exact, gradient": {"use_output_gradient": True},
    "loftq, 4": {"iterations": 4},
    "loftq, aware": {"iterations": 4, "is_activation_aware": True},
    "lq-lora, plain": {"use_fisher": False},
    "srr, 0": {"split": 0},
    "srr, half": {"split": 4},
    "srr, all": {"split": 8},
    "srr, joint": {"is_joint": True},
    "serq, output-error": {"saliency": "output-error"},
}
CORRECTING = [variant for variant in VARIANTS if variant not in ("none", "rtn")]


def config_for(variant: str, rank: int = 8, factor_dtype: str = "float32") -> ReconstructConfig:
    return reconstruct_cases.config_of(variant.split(",", 1)[0], rank, factor_dtype, **VARIANTS[variant])


def identity(statistics: InputStatistics) -> Tensor:
    return torch.eye(len(statistics.mean_square), dtype=torch.float64)


def l2qer_root(statistics: InputStatistics) -> Tensor:
    sizes = statistics.mean_abs.clamp(min=1e-4)
    return (sizes / (sizes.min() * sizes.max()).sqrt()).diag()


def exact_root(statistics: InputStatistics) -> Tensor:
    return reconstruct_cases.symmetric_root(statistics.autocorrelation)


def fisher_root(statistics: InputStatistics) -> Tensor:
    return statistics.fisher_columns.sqrt().diag()


def gradient_root(statistics: InputStatistics) -> Tensor:
    gradient = statistics.output_gradient
    return gradient.clamp(min=float(gradient.mean()) / 1000).sqrt()


# Methods that solve for the error of codes which they do not choose: no correction of their rank has a smaller loss.
ROOTS: dict[str, Callable[[InputStatistics], Tensor]] = {
    "none": identity,
    "rtn": identity,
    "zeroquant-v2": identity,
    "lqer": identity,
    "l2qer": l2qer_root,
    "qera-approx": lambda statistics: statistics.mean_square.sqrt().diag(),
    "qera-exact": exact_root,
    "qera-exact, gradient": exact_root,
    "loftq": identity,
    "srr, 0": exact_root,
}
OPTIMAL = [variant for variant in CORRECTING if variant in ROOTS]
# Methods that choose their codes: the norm in which they decide.
DECIDING: dict[str, Callable[[InputStatistics], Tensor]] = {
    "loftq, 4": identity,
    "loftq, aware": exact_root,
    "lq-lora": fisher_root,
    "lq-lora, plain": identity,
    "srr": exact_root,
    "srr, half": exact_root,
    "srr, all": exact_root,
    "srr, joint": exact_root,
    "serq": exact_root,
    "serq, output-error": exact_root,
}


def loss(error: Tensor, variant: str, statistics: InputStatistics) -> float:
    root = (ROOTS | DECIDING)[variant](statistics)
    return float((root @ (output_root(variant, statistics) * error).T).square().sum())


def output_root(variant: str, statistics: InputStatistics) -> Tensor:
    """Root of the weights of the output channels, as a column."""
    roots = {"qera-exact, gradient": gradient_root, "lq-lora": lambda statistics: statistics.fisher_rows.sqrt()}
    none = torch.ones(len(statistics.output_gradient), dtype=torch.float64)
    return roots.get(variant, lambda _: none)(statistics)[:, None]


def test_every_method_has_its_loss_written_down_here() -> None:
    assert ROOTS.keys() | DECIDING.keys() == VARIANTS.keys()


@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", ROOTS)
def test_the_claimed_loss_is_never_above_the_base_quantizers(variant: str, name: str, factor_dtype: str) -> None:
    case = make_case(name)
    achieved = loss(remaining_error(case, config_for(variant, factor_dtype=factor_dtype)), variant, case.statistics)
    assert achieved <= loss(case.base_error, variant, case.statistics)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", DECIDING)
def test_methods_that_choose_their_codes_are_no_worse_than_the_base_quantizer_here(variant: str, name: str) -> None:
    case = make_case(name)
    achieved = loss(remaining_error(case, config_for(variant)), variant, case.statistics)
    assert achieved <= loss(case.base_error, variant, case.statistics)


@pytest.mark.parametrize("name", CASES)
def test_the_activation_aware_loop_is_never_above_the_base_quantizer(name: str) -> None:
    """Its first iterate is QERA-exact, and it keeps the best."""
    case = make_case(name)
    exact, aware = (
        loss(remaining_error(case, config_for(variant)), "qera-exact", case.statistics)
        for variant in ("qera-exact", "loftq, aware")
    )
    assert aware <= exact * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", OPTIMAL)
def test_the_claimed_loss_is_the_least_that_its_rank_allows(variant: str, name: str) -> None:
    """Eckart-Young: no matrix of rank k comes closer than the trailing singular values of S E."""
    case = make_case(name)
    weighted = output_root(variant, case.statistics) * case.base_error
    singular_values = torch.linalg.svdvals(ROOTS[variant](case.statistics) @ weighted.T)
    achieved = loss(remaining_error(case, config_for(variant)), variant, case.statistics)
    least = float(singular_values[8:].square().sum())
    assert achieved == pytest.approx(least, rel=1e-6, abs=1e-10 * float(singular_values.square().sum()))


@pytest.mark.parametrize("name", ["healthy", "tall", "constant column"])
@pytest.mark.parametrize("variant", OPTIMAL)
def test_the_correction_is_the_textbook_one(variant: str, name: str) -> None:
    case = make_case(name)
    root, scale = ROOTS[variant](case.statistics), output_root(variant, case.statistics)
    left, sizes, right = torch.linalg.svd(root @ (scale * case.base_error).T, full_matrices=False)
    expected = torch.linalg.solve(root, left[:, :8] * sizes[:8] @ right[:8]).T / scale
    given = case.base_error - remaining_error(case, config_for(variant))
    assert torch.allclose(given, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", [v for v in CORRECTING if not v.startswith(("serq", "srr, half", "srr, all"))])
def test_full_rank_leaves_no_loss(variant: str, name: str) -> None:
    case = make_case(name)
    error = remaining_error(case, config_for(variant, rank=min(case.weight.shape)))
    assert loss(error, variant, case.statistics) <= 1e-10 * loss(case.weight.double(), variant, case.statistics)


@pytest.mark.parametrize("name", ["healthy", "few tokens", "no error"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_layer_gives_the_same_bytes(variant: str, name: str) -> None:
    case = make_case(name)
    first, _ = build(case, config_for(variant))
    torch.randn(10)  # the global generator must play no part
    second, _ = build(case, config_for(variant))
    assert torch.equal(first.quantized.codes, second.quantized.codes)
    if first.correction is not None:
        assert second.correction is not None
        assert torch.equal(first.correction.lora_up, second.correction.lora_up)
        if first.correction.lora_down is not None:
            assert torch.equal(first.correction.lora_down, second.correction.lora_down)


def factors_of(correction: Correction, variant: str, in_features: int) -> list[Tensor | QuantizedWeight]:
    """Both stored factors, or the one of SERQ, after a look at their dense shapes."""
    lora_up, lora_down = dense_factors(correction)
    assert lora_up.shape[1] == correction.rank
    if variant.startswith("serq"):
        assert correction.lora_down is None
        return [correction.lora_up]
    assert lora_down is not None
    assert correction.lora_down is not None
    assert lora_down.shape == (correction.rank, in_features)
    return [correction.lora_up, correction.lora_down]


@pytest.mark.parametrize(
    ("name", "factor_dtype"), [*((name, "float32") for name in CASES), ("healthy", "bfloat16"), ("healthy", "float16")]
)
@pytest.mark.parametrize("variant", CORRECTING)
def test_factors_have_the_shape_and_dtype_asked_for_and_are_finite(variant: str, name: str, factor_dtype: str) -> None:
    case = make_case(name)
    weights, _ = build(case, config_for(variant, factor_dtype=factor_dtype))
    assert weights.correction is not None
    assert weights.correction.rank == 8
    for factor in factors_of(weights.correction, variant, 64):
        assert isinstance(factor, Tensor)
        assert factor.dtype == getattr(torch, factor_dtype)
        assert factor.is_contiguous()
        assert factor.isfinite().all()


@pytest.mark.parametrize("factor_dtype", ["int8", "int4", "mxint8", "mxint6"])
@pytest.mark.parametrize("variant", [v for v in RECONSTRUCTORS if v in CORRECTING])
def test_quantized_factors_are_codes_that_cost_little(variant: str, factor_dtype: str) -> None:
    case, config = make_case("tall"), config_for(variant, 32, factor_dtype)
    weights, _ = build(case, config)
    assert weights.correction is not None
    assert all(isinstance(factor, QuantizedWeight) for factor in factors_of(weights.correction, variant, 64))
    achieved = loss(remaining_error(case, config), variant, case.statistics)
    floating = loss(remaining_error(case, config_for(variant, 32)), variant, case.statistics)
    assert achieved <= floating + (0.02 if "8" in factor_dtype else 0.5) * loss(
        case.base_error, variant, case.statistics
    )


@pytest.mark.parametrize("variant", [v for v in RECONSTRUCTORS if v in CORRECTING])
def test_a_weight_of_nothing_has_quantized_factors_of_nothing(variant: str) -> None:
    case = make_case("tall")
    case.weight.zero_()
    assert not remaining_error(case, config_for(variant, 32, "int8")).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rank_zero_is_the_base_quantizer_and_nothing_else(variant: str) -> None:
    case = make_case("healthy")
    weights, _ = build(case, config_for(variant, rank=0))
    assert torch.equal(weights.quantized.codes, quantize(case.weight).codes)
    assert weights.correction is None


@pytest.mark.parametrize("variant", ROOTS)
def test_methods_that_correct_given_codes_leave_them_as_they_are(variant: str) -> None:
    case = make_case("healthy")
    weights, _ = build(case, config_for(variant))
    assert torch.equal(dequantize(weights.quantized), dequantize(quantize(case.weight)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weight_and_the_statistics_stay_as_they_were(variant: str) -> None:
    case, untouched = make_case("healthy"), make_case("healthy")
    build(case, config_for(variant))
    assert torch.equal(case.weight, untouched.weight)
    for name in (field.name for field in fields(InputStatistics)):
        before, after = getattr(untouched.statistics, name), getattr(case.statistics, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after


FIELDS = {statistic: (statistic.value,) for statistic in Statistic} | {
    Statistic.FISHER: ("fisher_rows", "fisher_columns")
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_required_statistics_are_enough(variant: str) -> None:
    case = make_case("healthy")
    names = [name for statistic in get_reconstructor(config_for(variant)).requires for name in FIELDS[statistic]]
    only = Case(case.weight, InputStatistics(400, **{name: getattr(case.statistics, name) for name in names}))
    assert torch.equal(remaining_error(only, config_for(variant)), remaining_error(case, config_for(variant)))


@pytest.mark.parametrize(("variant", "statistic"), [(v, s) for v in CORRECTING for s in Statistic])
def test_a_statistic_that_is_unusable_is_named_when_it_is_needed(variant: str, statistic: Statistic) -> None:
    case = make_case("healthy")
    is_needed = statistic in get_reconstructor(config_for(variant)).requires
    for name in FIELDS[statistic]:
        good = getattr(case.statistics, name)
        nan, infinite, negative = good.clone(), good.clone(), good.clone()
        nan.view(-1)[0], infinite.view(-1)[-1], negative.view(-1)[0] = float("nan"), float("inf"), -1.0
        for bad in (nan, infinite, negative, good[:-1], None) if is_needed else (nan, None):
            broken = reconstruct_cases.without(case, **{name: bad})
            if is_needed:
                with pytest.raises(CalibrationError, match=name):
                    build(broken, config_for(variant))
            else:
                build(broken, config_for(variant))


@pytest.mark.parametrize("variant", [variant for variant in CORRECTING if not variant.startswith("serq")])
def test_a_rank_above_the_smaller_dimension_is_refused_by_layer_before_any_weight_is_read(variant: str) -> None:
    reconstructor = get_reconstructor(config_for(variant, rank=49))
    reconstructor.check(49, 64, "model.layers.0.mlp.up_proj")
    with pytest.raises(SchemeError, match=r"model\.layers\.3\.mlp\.up_proj: rank 49 .* 48 x 64 .* at most 48"):
        reconstructor.check(48, 64, "model.layers.3.mlp.up_proj")
    with pytest.raises(SchemeError, match="at most 48"):
        build(make_case("healthy"), config_for(variant, rank=49))


@pytest.mark.parametrize("variant", CORRECTING)
def test_groups_that_do_not_tile_the_factors_are_refused_by_layer(variant: str) -> None:
    reconstructor = get_reconstructor(config_for(variant, rank=20, factor_dtype="mxint8"))
    with pytest.raises(SchemeError, match=r"model\.layers\.3\.mlp\.up_proj: factor_dtype mxint8 has groups of 32"):
        reconstructor.check(72, 72, "model.layers.3.mlp.up_proj")
    get_reconstructor(config_for(variant, rank=0, factor_dtype="mxint8")).check(72, 72, "any")


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if not variant.startswith("serq")])
def test_methods_without_salient_channels_leave_the_channels_in_order(variant: str) -> None:
    case = make_case("healthy")
    assert get_reconstructor(config_for(variant)).channel_order(case.weight, case.statistics) is None


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemeError, match=r"'svd' is unknown; choose one of .*qera-exact.*loftq, lq-lora, serq, srr"):
        get_reconstructor(ReconstructConfig("svd"))
