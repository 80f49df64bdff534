"""One linear layer on the native kernels, against float64 sums of what its codes stand for."""

import itertools

import pytest
import torch
from torch import Tensor

from models.kernels.base import LinearSpec
from models.kernels.native.backend import NativeBackend, NativeLinear
from models.kernels.native.factors import byte_factors
from models.kernels.native.inputs import ActivationBits
from models.quant.factors import store_factors
from models.quant.grid import dense_factors
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights
from tests.support.linear_oracle import random_layer
from tests.support.native import expected_product, needs_native, rounded_inputs, runtime

CPU = torch.device("cpu")
BITS: tuple[ActivationBits, ...] = (8, 16)
SCHEMES = (
    *(QuantScheme(bits, size, is_symmetric)
      for bits, size, is_symmetric in itertools.product(range(2, 9), (-1, 32, 64, 96, 192), (False, True))),
    *(QuantScheme(bits, 32, format="mxint", exponent=rule) for bits in (2, 4, 5, 8) for rule in ("floor", "ceil")),
)  # fmt: skip
FEW_SCHEMES = (QuantScheme(4, 64), QuantScheme(2, 32, True), QuantScheme(8, 96), QuantScheme(3, -1, True))
ACTIVATIONS = (
    None,
    ActivationScheme(8),
    ActivationScheme(8, is_symmetric=True),
    ActivationScheme(8, 32),
    ActivationScheme(4, 64, is_symmetric=True, clip_ratio=0.9),
    ActivationScheme(4, 96, clip_ratio=0.8),
    ActivationScheme(6, 32, format="mxint"),
    ActivationScheme(8, 32, format="mxint", exponent="ceil"),
)
SHAPE = (40, 192)

pytestmark = needs_native


def prepare(weights: LinearWeights, bits: ActivationBits = 8, dtype: torch.dtype = torch.float32) -> NativeLinear:
    backend = NativeBackend(bits, runtime())
    assert backend.unsupported(LinearSpec.of(weights, CPU, dtype)) is None
    prepared = backend.prepare(weights, CPU, dtype)
    assert isinstance(prepared, NativeLinear)
    return prepared


def assert_as_defined(weights: LinearWeights, x: Tensor, bits: ActivationBits = 8) -> None:
    """Within float32's rounding of sums over blocks; the low-rank term's reduced rows are rounded to 16 bits, too."""
    prepared = prepare(weights, bits)
    block = prepared.matrix.block
    expected = expected_product(weights, rounded_inputs(weights, x, block, bits), block)
    rounding = torch.finfo(torch.float32).eps
    num_terms = x.shape[1] // 32 + 8
    error = (prepared(x).double() - expected.value).abs()
    assert (error <= num_terms * rounding * expected.magnitude + 1.01 * expected.rounding + 1e-30).all()
    # roundings cancel on average, and a wrong scale, zero point or order cannot hide in the sum
    assert float(error.norm()) <= 16 * rounding * float(expected.value.norm()) + 0.5 * float(expected.rounding.norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme} {scheme.exponent}")
def test_every_format_is_computed_as_defined(scheme: QuantScheme, bits: ActivationBits) -> None:
    assert_as_defined(random_layer(scheme, SHAPE, has_bias=True), torch.randn(3, SHAPE[1]), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("rank", "variant"), [(0, "scale"), (1, "order"), (8, ""), (32, "scale order"), (33, ""),
                                               (8, "serq"), (32, "serq scale order"), (70, "serq")])  # fmt: skip
@pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
def test_every_part_of_a_layer_is_computed_as_defined(
    scheme: QuantScheme, rank: int, variant: str, activations: ActivationScheme | None, bits: ActivationBits
) -> None:
    weights = random_layer(scheme, SHAPE, rank, variant, has_bias=True, activations=activations)
    x = torch.randn(4, SHAPE[1])
    x[:, 7] *= 30
    assert_as_defined(weights, x, bits)


@pytest.mark.parametrize("rotation_block", [16, 32, 64])
@pytest.mark.parametrize("activations", [None, ActivationScheme(8)], ids=str)
def test_rotated_inputs_are_close_to_the_definition(activations: ActivationScheme | None, rotation_block: int) -> None:
    # A rotation sums in another order than the definition: a value near the middle of a step may land one step off.
    weights = random_layer(QuantScheme(4, 64), SHAPE, 8, rotation_block=rotation_block, activations=activations)
    x = torch.randn(16, SHAPE[1])
    prepared = prepare(weights)
    expected = expected_product(weights, rounded_inputs(weights, x, 64, 8), 64).value
    assert float((prepared(x).double() - expected).norm()) <= 1e-3 * float(expected.norm())


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (31, 96), (33, 128), (96, 2048), (200, 320)])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 13, 300])
def test_odd_shapes_are_computed_as_defined(shape: tuple[int, int], num_rows: int) -> None:
    assert_as_defined(random_layer(QuantScheme(4, 32), shape, 5, has_bias=True), torch.randn(num_rows, shape[1]))


@pytest.mark.parametrize("variant", ["", "serq"])
@pytest.mark.parametrize(
    "factor_dtype", ["bfloat16", "float16", "float32", "int8", "int4", "mxint8", "mxint6", "mxint4"]
)
def test_factors_of_every_type_are_taken(factor_dtype: str, variant: str) -> None:
    weights = random_layer(QuantScheme(4, 64), (64, 192), 32, variant, factor_dtype=factor_dtype)  # type: ignore[arg-type]
    assert_as_defined(weights, torch.randn(3, 192))


@pytest.mark.parametrize("rank", [1, 16, 32, 48])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e-6])
def test_eight_bits_cost_less_than_a_percent_of_the_correction(rank: int, spread: float) -> None:
    # components of very different sizes, as singular vectors are
    sizes = torch.logspace(0, -2, rank)
    lora_up = torch.randn(320, rank) * sizes * spread
    lora_down = torch.randn(rank, 256) * sizes[:, None]
    factors = byte_factors(store_factors(lora_up, lora_down, "float32"), 64)
    assert factors.lora_down is not None
    got = factors.lora_up.values().double() @ factors.lora_down.values().double()
    expected = lora_up.double() @ lora_down.double()
    assert 0 < float((got - expected).norm()) < 0.01 * float(expected.norm())


def test_eight_bits_cost_less_than_a_percent_of_a_single_factor() -> None:
    weights = random_layer(QuantScheme(4, 64), (320, 256), 48, "serq")
    assert weights.correction is not None
    expected, _ = dense_factors(weights.correction)
    got = byte_factors(weights.correction, 64).lora_up.values()[:, :48]
    assert 0 < float((got - expected.float()).norm()) < 0.01 * float(expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_come_in_the_type_of_the_inputs(dtype: torch.dtype) -> None:
    weights = random_layer(QuantScheme(4, 64), (48, 128), 8, has_bias=True)
    x = torch.randn(3, 128).to(dtype)
    y = prepare(weights, dtype=dtype)(x)
    assert y.dtype == dtype
    assert torch.equal(y, prepare(weights)(x.float()).to(dtype))


def test_a_row_does_not_depend_on_its_neighbours_at_all() -> None:
    prepared = prepare(random_layer(QuantScheme(3, 32), (100, 256), 40, "scale order", has_bias=True))
    x = torch.randn(300, 256)
    together = prepared(x)
    for size in (1, 7, 64, 299):
        assert torch.equal(torch.cat([prepared(rows) for rows in torch.split(x, size)]), together)


@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_inputs_may_be_strided_or_misaligned_and_stay_as_they_are(num_rows: int) -> None:
    prepared = prepare(random_layer(QuantScheme(4, 64), (32, 64), 4))
    x = torch.randn(num_rows, 64)
    copy, expected = x.clone(), prepared(x)
    strided = torch.stack((x, -x), -1)[..., 0]
    misaligned = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert torch.equal(prepared(strided), expected)
    assert torch.equal(prepared(misaligned), expected)
    assert torch.equal(x, copy)


def test_no_rows_give_no_outputs() -> None:
    prepared = prepare(random_layer(QuantScheme(4, 64), (48, 128), 8, has_bias=True))
    assert prepared(torch.empty(0, 128)).shape == (0, 48)


@pytest.mark.parametrize("activations", [None, ActivationScheme(8), ActivationScheme(4, 32, format="mxint")], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_own_row_only(value: float, activations: ActivationScheme | None) -> None:
    prepared = prepare(random_layer(QuantScheme(4, 64), (48, 128), 8, activations=activations))
    x = torch.randn(3, 128)
    expected = prepared(x)
    x[1, 77] = value
    y = prepared(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])


def test_rows_of_zeros_give_the_bias() -> None:
    weights = random_layer(QuantScheme(4, 64), (48, 128), 8, has_bias=True)
    assert weights.bias is not None
    assert torch.equal(prepare(weights)(torch.zeros(2, 128)), weights.bias.expand(2, -1))


def test_bytes_are_those_of_everything_that_is_kept() -> None:
    weights = random_layer(QuantScheme(4, 64), (64, 256), 32, "scale order", has_bias=True)
    strip = 4 * (128 + 32 * 32) + (
        64 + 32 * 32
    )  # four blocks behind scales and zero points, one of lora_up behind scales
    down = 4 * (64 + 64 * 32)
    assert prepare(weights).nbytes == 2 * strip + down + 64 * 4 + 256 * 4 + 256 * 4
