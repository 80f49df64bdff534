"""MXINT, MXFP4 and NF4 weights against exact definitions, written down from the papers; and what each format costs."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.errors import SchemeError
from models.quant.grid import choose_grid, decode, dequantize, encode, quantize
from models.quant.mx import decode_e2m1, encode_e2m1, round_e2m1
from models.quant.nf import NF4_VALUES
from models.quant.packing import pack
from models.quant.rtn import quantize_rtn
from models.scheme import GROUP_SIZES, ExponentRule, QuantScheme
from tests.support.number_formats import e2m1_values, floor_log2, mxfp4, mxint, nearest_e2m1

RULES: tuple[ExponentRule, ...] = ("floor", "ceil")
MXINT = [
    QuantScheme(bits, size, format="mxint", exponent=rule)
    for bits in range(2, 9)
    for size in (16, 32)
    for rule in RULES
]
MXFP4 = QuantScheme(4, 32, format="mxfp4")
NF4 = [QuantScheme(4, size, format="nf4") for size in (32, 64, 128)]
ALL = [*MXINT, MXFP4, *NF4]
LEAST_STEP = 2.0**-126

numbers = (
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.integers(-64, 64).map(lambda n: n / 8)
    | st.sampled_from([0.0, -0.0])
)


def restored(weight: Tensor, scheme: QuantScheme) -> Tensor:
    return dequantize(quantize_rtn(weight, scheme))


@given(block=st.lists(numbers, min_size=16, max_size=16), width=st.integers(2, 8), rule=st.sampled_from(RULES))
def test_a_block_of_mxint_is_what_the_papers_define(block: list[float], width: int, rule: ExponentRule) -> None:
    values = torch.tensor([block])
    found = restored(values, QuantScheme(width, 16, format="mxint", exponent=rule))[0].tolist()
    wanted = mxint(block, width, rule)
    if max(map(abs, block)) >= 2.0**-100:  # below, the exponent stops at that of the smallest normal float32
        assert [Fraction(value) for value in found] == wanted
    else:
        assert all(abs(a - b) <= LEAST_STEP for a, b in zip(found, block, strict=True))


@given(block=st.lists(numbers, min_size=32, max_size=32))
def test_a_block_of_mxfp4_is_what_the_standard_defines(block: list[float]) -> None:
    found = restored(torch.tensor([block]), MXFP4)[0].tolist()
    if max(map(abs, block)) >= 2.0**-100:
        assert [Fraction(value) for value in found] == mxfp4(block)
    else:
        assert all(abs(a - b) <= LEAST_STEP for a, b in zip(found, block, strict=True))


@pytest.mark.parametrize("width", range(2, 9))
def test_the_two_exponent_rules_differ_only_where_the_largest_value_is_a_power_of_two(width: int) -> None:
    floor, ceil = (QuantScheme(width, 32, format="mxint", exponent=rule) for rule in RULES)
    weight = torch.randn(16, 64)
    assert torch.equal(restored(weight, floor), restored(weight, ceil))
    power = weight.clamp(-1, 1)
    power[:, ::32] = 2.0
    steps = [quantize_rtn(power, scheme).scale for scheme in (floor, ceil)]
    assert torch.equal(steps[0], 2 * steps[1])
    assert torch.equal(restored(power, floor)[:, 0], torch.full((16,), 2.0))
    assert torch.equal(restored(power, ceil)[:, 0], torch.full((16,), 2.0 * (1 - 2.0 ** -(width - 1))))


def test_every_e2m1_code_stands_for_the_number_of_its_bits() -> None:
    expected = [float(number) for number, _ in e2m1_values()]
    assert decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == expected + [-number for number in expected]


@given(st.lists(st.integers(-200, 200).map(lambda n: n / 16) | st.floats(-9, 9, width=32), min_size=1, max_size=40))
def test_e2m1_rounds_to_the_nearest_and_halfway_to_the_even_mantissa(values: list[float]) -> None:
    steps = torch.tensor(values)
    expected = [float(nearest_e2m1(Fraction(value))) for value in values]
    assert decode_e2m1(encode_e2m1(steps)).tolist() == expected
    assert round_e2m1(steps).tolist() == expected


def quantile(probability: float) -> float:
    """Of the normal distribution, by bisection of its distribution function."""
    low, high = -10.0, 10.0
    while high - low > 1e-14:
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < probability else (low, middle)
    return (low + high) / 2


def test_the_values_of_nf4_are_the_quantiles_that_its_paper_constructs() -> None:
    largest = (1 - 1 / 32 + 1 - 1 / 30) / 2

    def half(count: int) -> list[float]:
        return [quantile(largest + (0.5 - largest) * i / count) / quantile(largest) for i in range(count)]

    expected = [-value for value in half(7)] + [0.0] + half(8)[::-1]
    assert list(NF4_VALUES) == pytest.approx(expected, abs=3e-7)
    assert list(NF4_VALUES) == sorted(NF4_VALUES)
    assert (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (-1, 0, 1)


@pytest.mark.parametrize("scheme", NF4, ids=str)
def test_every_nf4_code_is_the_nearest_of_all_sixteen(scheme: QuantScheme) -> None:
    weight = torch.randn(2, 128) * torch.tensor([[1e-3], [30.0]])
    quantized = quantize_rtn(weight, scheme)
    values, found = weight.double().tolist(), dequantize(quantized).double().tolist()
    for row in range(2):
        for column, value in enumerate(values[row]):
            scale = float(quantized.scale[row, column // scheme.group_size])
            distances = [abs(value - scale * number) for number in NF4_VALUES]
            assert abs(value - found[row][column]) <= min(distances) + 1e-6 * scale
            assert found[row][column] == pytest.approx(scale * NF4_VALUES[int(quantized.codes[row, column])], rel=1e-7)


@pytest.mark.parametrize("scheme", NF4, ids=str)
def test_the_scale_of_nf4_is_the_largest_magnitude_in_float16(scheme: QuantScheme) -> None:
    weight = torch.randn(3, 256)
    quantized = quantize_rtn(weight, scheme)
    expected = [[max(map(abs, group)) for group in row] for row in weight.view(3, -1, scheme.group_size).tolist()]
    assert torch.equal(quantized.scale, torch.tensor(expected).half())


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_shapes_dtypes_and_ranges_are_those_of_the_contract(scheme: QuantScheme) -> None:
    quantized = quantize_rtn(torch.randn(6, 256) * torch.logspace(-9, 4, 6)[:, None], scheme)
    assert quantized.codes.shape == (6, 256)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) <= scheme.max_code
    assert quantized.scale.shape == (6, 256 // scheme.group_size)
    assert quantized.zero_point is None
    assert (quantized.scale > 0).all()
    if scheme.has_exponent_scale:
        assert quantized.scale.dtype == torch.bfloat16
        assert (torch.frexp(quantized.scale.float()).mantissa == 0.5).all()
    else:
        assert quantized.scale.dtype == torch.float16
    if scheme.format == "mxint":
        assert int(quantized.codes.min()) >= 1


@pytest.mark.parametrize("scheme", [s for s in ALL if (s.num_bits, s.exponent) != (2, "ceil")], ids=str)
def test_what_lies_on_the_grid_stays_where_it_is(scheme: QuantScheme) -> None:
    weight = torch.randn(4, 128).clamp(-1.8, 1.8)
    if scheme.exponent == "ceil":
        weight[:, ::16] = 1.9  # comes out as an odd number of steps: this rule clips a power of two once more
    once = restored(weight, scheme)
    assert torch.equal(restored(once, scheme), once)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_zeros_alone_and_in_groups_stay_exactly_zero(scheme: QuantScheme) -> None:
    weight = torch.randn(4, 256) + 0.5
    weight[:, ::5], weight[1], weight[2, :128] = 0, 0, 0
    found = restored(weight, scheme)
    assert found.isfinite().all()
    assert not found[:, ::5].any()
    assert not found[1].any()
    assert not found[2, :128].any()


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-6, 1.0, 6e4])
def test_weights_of_any_size_come_back_finite_and_no_further_than_a_step_away(scheme: QuantScheme, size: float) -> None:
    weight = torch.rand(4, 128) * 2 * size - size
    quantized = quantize_rtn(weight, scheme)
    error = (weight - dequantize(quantized)).abs().view(4, -1, scheme.group_size)
    coarsest = {"mxint": 1.0, "mxfp4": 2.0, "nf4": 0.16}[scheme.format]
    assert (error <= coarsest * quantized.scale.float()[:, :, None]).all()


@pytest.mark.parametrize("scheme", [*MXINT[::7], MXFP4], ids=str)
def test_the_largest_float32_weights_do_not_overflow(scheme: QuantScheme) -> None:
    weight = torch.full((2, 64), torch.finfo(torch.float32).max)
    found = restored(weight, scheme)
    assert found.isfinite().all()
    assert (found >= weight / 2).all()


@pytest.mark.parametrize("scheme", [MXFP4, MXINT[0], NF4[0]], ids=str)
def test_a_weight_beyond_float32_is_refused_with_its_place(scheme: QuantScheme) -> None:
    weight = torch.zeros(4, 64, dtype=torch.float64)
    weight[1, 2] = 1e300
    with pytest.raises(SchemeError, match=r"holds 1e\+300 at row 1, column 2"):
        quantize_rtn(weight, scheme)


def test_a_weight_too_large_for_the_scale_of_nf4_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"scale of 7e\+04 in row 0, group 0"):
        quantize_rtn(torch.full((1, 64), 70000.0), NF4[1])


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_column_by_column_gives_the_same_codes_and_values_as_all_at_once(scheme: QuantScheme) -> None:
    weight = torch.randn(5, 128)
    scale, zero_point = choose_grid(weight, scheme)
    whole = quantize(weight, scale, zero_point, scheme)
    for column in (0, 15, 16, 77, 127):
        group = column // scheme.group_size
        codes = encode(weight[:, column], scale[:, group], None, scheme)
        assert torch.equal(codes, whole.codes[:, column])
        assert torch.equal(decode(codes, scale[:, group], None, scheme), dequantize(whole)[:, column])


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_no_code_is_nearer_than_the_one_that_is_chosen(scheme: QuantScheme) -> None:
    weight = torch.randn(2, 128)
    quantized = quantize_rtn(weight, scheme)
    lowest = 1 if scheme.format == "mxint" else 0
    candidates = torch.arange(lowest, scheme.max_code + 1, dtype=torch.uint8)
    scale = quantized.scale.repeat_interleave(scheme.group_size, 1)[..., None]
    distances = (decode(candidates.expand(2, 128, -1), scale, None, scheme) - weight[..., None]).abs()
    chosen = (dequantize(quantized) - weight).abs()
    assert (chosen <= distances.amin(-1) + 1e-6 * scale[..., 0].float()).all()


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        *((QuantScheme(bits, 16, format="mxint"), bits + 0.5) for bits in range(2, 9)),
        *((QuantScheme(bits, 32, format="mxint"), bits + 0.25) for bits in range(2, 9)),
        (MXFP4, 4.25),
        (QuantScheme(4, 64, format="nf4"), 4.25),
        (QuantScheme(4, 128), 4 + 20 / 128),
        (QuantScheme(4, 128, True), 4.125),
        (QuantScheme(3, -1, True), 3 + 16 / 768),
        (QuantScheme(5, 96), 5 + 21 / 96),
    ],
    ids=str,
)
def test_effective_bits_are_those_of_codes_and_scales(scheme: QuantScheme, bits: float) -> None:
    quantized = quantize_rtn(torch.randn(8, 768), scheme)
    assert scheme.weight_bits(768) == bits
    assert quantized.num_stored_bits == bits * 8 * 768
    scale_bits = 8 if scheme.has_exponent_scale else 16
    stored = 8 * pack(quantized.codes, scheme.num_bits).nbytes + scale_bits * quantized.scale.numel()
    if quantized.zero_point is not None:
        stored += scheme.num_bits * quantized.zero_point.numel()
    assert stored == bits * 8 * 768


@pytest.mark.parametrize("format_", GROUP_SIZES)
def test_a_group_size_that_a_format_does_not_have_is_refused_with_those_it_has(format_: str) -> None:
    with pytest.raises(SchemeError, match=rf"group_size is 48; for {format_} choose one of "):
        QuantScheme(4, 48, format=format_)  # type: ignore[arg-type]


def test_the_oracle_finds_exponents_of_any_size() -> None:
    assert [floor_log2(Fraction(value)) for value in (1, 2, 3, 4, 0.5, 0.3, 1e-30)] == [0, 1, 1, 2, -1, -2, -100]
