"""The affine grid and round-to-nearest, against float64 loops over the definition."""

import itertools

import pytest
import torch
from torch import Tensor

from models.errors import SchemeError
from models.quant.grid import dequantize, quantize
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from models.types import QuantizedWeight

SCHEMES = [
    QuantScheme(num_bits, group_size, is_symmetric)
    for num_bits, group_size, is_symmetric in itertools.product(range(2, 9), (-1, 32, 64, 128), (False, True))
]
FLOAT16_STEP = 2.0**-24


def grid_value(quantized: QuantizedWeight, row: int, column: int, code: int) -> float:
    """What ``code`` would stand for at this place, by the definition."""
    group = column // quantized.scheme.group_length(quantized.in_features)
    zero_point = quantized.zero_point
    offset = 2 ** (quantized.scheme.num_bits - 1) if zero_point is None else int(zero_point[row, group])
    return float(quantized.scale[row, group]) * (code - offset)


def grouped(values: Tensor, scheme: QuantScheme) -> Tensor:
    return values.reshape(values.shape[0], -1, scheme.group_length(values.shape[1]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shapes_dtypes_and_ranges_are_those_of_the_contract(scheme: QuantScheme) -> None:
    quantized = quantize_rtn(torch.randn(6, 256), scheme)
    num_groups = scheme.num_groups(256)
    assert quantized.codes.shape == (6, 256)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) <= scheme.max_code
    assert quantized.scale.shape == (6, num_groups)
    assert quantized.scale.dtype == torch.float16
    assert quantized.scale.isfinite().all()
    assert (quantized.scale > 0).all()
    assert quantized.scheme == scheme
    if scheme.is_symmetric:
        assert quantized.zero_point is None
    else:
        assert quantized.zero_point is not None
        assert quantized.zero_point.shape == (6, num_groups)
        assert quantized.zero_point.dtype == torch.uint8
        assert int(quantized.zero_point.max()) <= scheme.max_code


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_is_the_definition_to_the_last_bit(scheme: QuantScheme) -> None:
    quantized = quantize_rtn(torch.randn(3, 128), scheme)
    weight = dequantize(quantized)
    assert weight.dtype == torch.float32
    expected = [
        [grid_value(quantized, row, column, int(quantized.codes[row, column])) for column in range(128)]
        for row in range(3)
    ]
    assert weight.tolist() == expected


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.num_bits in (2, 3, 4, 8) and s.group_size == 32], ids=str)
def test_every_code_is_the_nearest_of_all_codes(scheme: QuantScheme) -> None:
    weight = torch.randn(3, 64)
    quantized = quantize_rtn(weight, scheme)
    for row, column in itertools.product(range(3), range(64)):
        wanted = float(weight[row, column])
        distances = [abs(wanted - grid_value(quantized, row, column, code)) for code in range(scheme.max_code + 1)]
        chosen = distances[int(quantized.codes[row, column])]
        assert chosen <= min(distances) + 1e-6 * abs(wanted)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(scheme: QuantScheme) -> None:
    weight = torch.randn(8, 256) * torch.logspace(-4, 2, 8)[:, None] + torch.randn(8, 1)
    quantized = quantize_rtn(weight, scheme)
    error = grouped((weight - dequantize(quantized)).abs(), scheme)
    # rounding the scale to 11 bits may leave the outermost code short of the span by max_code * 2**-11 steps
    slack = 0.5 + scheme.max_code * 2.0**-11 + 1e-4
    assert (error <= slack * quantized.scale.float()[:, :, None]).all()


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_a_weight_on_the_grid_is_reproduced_exactly(num_bits: int) -> None:
    scheme = QuantScheme(num_bits, 32)
    codes = torch.randint(2**num_bits, (4, 64), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, scheme.max_code
    zero_point = torch.randint(2**num_bits, (4, 2), dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-8, 3, (4, 2))
    original = QuantizedWeight(codes, scale.half(), zero_point, scheme)
    again = quantize_rtn(dequantize(original), scheme)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, original.scale)
    assert again.zero_point is not None
    assert torch.equal(again.zero_point, zero_point)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_stays_exactly_zero(scheme: QuantScheme) -> None:
    weight = torch.randn(4, 128) + 0.7
    weight[:, ::5] = 0
    assert not dequantize(quantize_rtn(weight, scheme))[:, ::5].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_is_reproduced_exactly(scheme: QuantScheme) -> None:
    weight = torch.randn(4, 256)
    weight[1], weight[2, :128] = 0, 0
    restored = dequantize(quantize_rtn(weight, scheme))
    assert not restored[1].any()
    assert not restored[2, :128].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [3.7, -0.02])
def test_a_constant_group_is_off_by_no_more_than_the_rounding_of_its_scale(scheme: QuantScheme, value: float) -> None:
    weight = torch.full((2, 128), value)
    assert torch.allclose(dequantize(quantize_rtn(weight, scheme)), weight, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [1e-40, 1e-9, 3e-7, 2e-6, 5e-5])
def test_tiny_weights_keep_a_positive_scale_and_are_not_clipped(scheme: QuantScheme, size: float) -> None:
    weight = torch.randn(4, 128) * size
    quantized = quantize_rtn(weight, scheme)
    assert (quantized.scale > 0).all()
    error = grouped((weight - dequantize(quantized)).abs(), scheme)
    slack = 0.5 + scheme.max_code * 2.0**-11 + 1e-4
    assert (error <= slack * quantized.scale.float()[:, :, None]).all()
    assert float(quantized.scale.float().max()) <= max(FLOAT16_STEP, 16 * size)


def test_smaller_steps_come_with_more_bits() -> None:
    weight = torch.randn(16, 256)
    for group_size, is_symmetric in itertools.product((-1, 64), (False, True)):
        errors = [
            float((weight - dequantize(quantize_rtn(weight, QuantScheme(bits, group_size, is_symmetric)))).norm())
            for bits in range(2, 9)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] / 30


def test_codes_are_chosen_against_the_stored_scale() -> None:
    weight = torch.tensor([[0.0, 255.0 * 1.0004]]).repeat(1, 16)  # 1.0004 rounds to 1.0 in float16
    quantized = quantize_rtn(weight, QuantScheme(8, 32))
    assert float(quantized.scale[0, 0]) == 1.0
    middle = quantize(torch.full((1, 32), 127.4), quantized.scale, quantized.zero_point, quantized.scheme)
    assert int(middle.codes[0, 0]) == 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_give_what_their_float32_value_gives(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64).to(dtype)
    given, expected = quantize_rtn(weight, QuantScheme()), quantize_rtn(weight.float(), QuantScheme())
    assert torch.equal(given.codes, expected.codes)
    assert torch.equal(given.scale, expected.scale)


def test_quantizing_leaves_the_weight_alone() -> None:
    weight = torch.randn(4, 64)
    copy = weight.clone()
    quantize_rtn(weight, QuantScheme())
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 33] = value
    with pytest.raises(SchemeError, match=r"\(4, 64\) holds -?(nan|inf) at row 2, column 33"):
        quantize_rtn(weight, QuantScheme())


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("size", [3e6, 3e38])
def test_a_weight_too_large_for_its_scale_is_refused_with_its_group(is_symmetric: bool, size: float) -> None:
    weight = torch.randn(4, 128)
    weight[3, 70] = size
    weight[3, 71] = -size
    with pytest.raises(SchemeError, match=r"shape \(4, 128\) needs a scale of .* in row 3, group 1 "):
        quantize_rtn(weight, QuantScheme(4, 64, is_symmetric))


@pytest.mark.parametrize("group_size", [16, 96, 192, 256])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_other_group_sizes_are_groups_on_their_own(group_size: int, is_symmetric: bool) -> None:
    weight = torch.randn(4, 768)
    whole = quantize_rtn(weight, QuantScheme(4, group_size, is_symmetric))
    groups = torch.split(weight, group_size, 1)
    alone = [quantize_rtn(group.contiguous(), QuantScheme(4, -1, is_symmetric)) for group in groups]
    assert torch.equal(dequantize(whole), torch.cat([dequantize(group) for group in alone], 1))


def test_groups_that_do_not_tile_the_rows_are_refused() -> None:
    with pytest.raises(SchemeError, match="group_size 64 does not divide its 96 input channels"):
        quantize_rtn(torch.randn(4, 96), QuantScheme(4, 64))


@pytest.mark.parametrize("weight", [torch.randn(64), torch.ones(4, 64, dtype=torch.int32), torch.empty(0, 64)])
def test_anything_but_a_float_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(SchemeError, match="weight"):
        quantize_rtn(weight, QuantScheme())
