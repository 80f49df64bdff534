"""One contract over all backends: against a float64 loop on tiny shapes, against the reference on larger ones."""

import itertools

import pytest
import torch
from torch import Tensor

from models.config import FactorDtype
from models.kernels.base import KernelBackend, LinearSpec
from models.kernels.dense_terms import DenseTerms
from models.kernels.dequantized import DequantizedBackend
from models.kernels.reference import ReferenceBackend
from models.kernels.torch_int4 import TorchInt4Backend
from models.kernels.torch_int8 import TorchInt8Backend
from models.scheme import ActivationScheme, ExponentRule, QuantScheme
from models.types import LinearWeights
from tests.support.linear_oracle import Expected, expected_output, expected_product, random_layer

CPU = torch.device("cpu")
# the native backend rounds inputs and factors: test_native_linear.py says what it must give
FLOAT_BACKENDS: tuple[KernelBackend, ...] = (TorchInt4Backend(), TorchInt8Backend(), ReferenceBackend())
RULES: tuple[ExponentRule, ...] = ("floor", "ceil")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = tuple(
    QuantScheme(num_bits, group_size, is_symmetric)
    for num_bits, group_size, is_symmetric in itertools.product(range(2, 9), (-1, 32, 64, 128), (False, True))
)
FORMATS = (
    *(QuantScheme(bits, size, format="mxint", exponent=rule)
      for bits in (2, 3, 4, 6, 8) for size in (16, 32) for rule in RULES),
    QuantScheme(4, 32, format="mxfp4"),
    *(QuantScheme(4, size, format="nf4") for size in (32, 64, 128)),
)  # fmt: skip
MXINT4 = QuantScheme(4, 32, format="mxint")
ACTIVATIONS = (
    ActivationScheme(8),
    ActivationScheme(8, is_symmetric=True),
    ActivationScheme(4, 32),
    ActivationScheme(4, 64, is_symmetric=True),
    ActivationScheme(6, 16, format="mxint"),
    ActivationScheme(8, 16, format="mxint", exponent="ceil"),
    ActivationScheme(4, 32, format="mxfp4"),
)
FAST_SCHEMES = (QuantScheme(4, 32), QuantScheme(4, -1), QuantScheme(4, -1, True), QuantScheme(8, -1, True))
VARIANTS = ("", "scale", "order", "scale order", "serq", "serq scale order")

Run = tuple[KernelBackend, QuantScheme, torch.dtype, tuple[int, int]]


def runs(schemes: tuple[QuantScheme, ...], dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, int]) -> list[object]:
    """Every combination that a backend says it can run, as test parameters."""
    parameters = []
    backends = (*FLOAT_BACKENDS, DequantizedBackend())
    for backend, scheme, dtype, shape in itertools.product(backends, schemes, dtypes, shapes):
        spec = LinearSpec(scheme, shape[1], shape[0], 0, False, False, CPU, dtype)
        if backend.unsupported(spec) is None:
            name = f"{backend.name} {scheme} {scheme.exponent} {dtype} {shape}"
            parameters.append(pytest.param((backend, scheme, dtype, shape), id=name))
    return parameters


def assert_close(given: Tensor, weights: LinearWeights, x: Tensor) -> None:
    """``given`` is what the layer makes of ``x``."""
    assert given.dtype == x.dtype
    assert_near(given, expected_output(weights, x), x)


def assert_near(given: Tensor, expected: Expected, x: Tensor) -> None:
    """Within the rounding errors of the dtype: at most seven roundings lie between codes and output (input divided,
    scale, weight, product, bias, down-product, sum), each relative to the sum of magnitudes; sums are in float32.
    """
    rounding = torch.finfo(x.dtype).eps / 2
    summing = x.shape[1] * torch.finfo(torch.float32).eps
    error = (given.double() - expected.value).abs()
    assert (error <= (7 * rounding + summing) * expected.magnitude + 1e-6).all()
    # random signs: on average roundings cancel, and a wrong scale, zero point or order cannot hide in the sum
    assert float(error.norm()) <= (7 * rounding + summing) * float(expected.value.norm())


def test_every_backend_is_under_test() -> None:
    every = SCHEMES + FORMATS
    covered = {(run.values[0][0].name, run.values[0][1]) for run in runs(every, DTYPES, (16, 128))}
    for runs_all in ("reference", "dequantized"):
        assert {scheme for name, scheme in covered if name == runs_all} == set(every)
    mxint4 = {QuantScheme(4, 32, format="mxint", exponent=rule) for rule in RULES}
    int4 = {scheme for scheme in SCHEMES if scheme.num_bits == 4}
    assert {scheme for name, scheme in covered if name == "torch-int4"} == int4 | mxint4
    assert {scheme for name, scheme in covered if name == "torch-int8"} == {QuantScheme(8, -1, True)}


@pytest.mark.parametrize("run", runs(SCHEMES + FORMATS, DTYPES, (16, 128)))
def test_every_scheme_is_computed_as_defined(run: Run) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, rank=2)
    x = torch.randn(2, shape[1]).to(dtype)
    assert_close(backend.prepare(weights, CPU, dtype)(x), weights, x)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [0, 8, 32])
@pytest.mark.parametrize("run", runs(FAST_SCHEMES[::3], DTYPES[:2], (16, 64)))
def test_every_part_of_a_layer_is_computed_as_defined(run: Run, rank: int, variant: str, has_bias: bool) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, rank, variant, has_bias)
    x = torch.randn(3, shape[1]).to(dtype)
    assert_close(backend.prepare(weights, CPU, dtype)(x), weights, x)


@pytest.mark.parametrize("rotation_block", [0, 16, 64])
@pytest.mark.parametrize("activations", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize(
    "run", runs((*FORMATS[::6], *FORMATS[20:22], MXINT4, *FAST_SCHEMES[:1]), (torch.float32,), (16, 128))
)
def test_rotated_and_quantized_inputs_are_computed_as_defined(
    run: Run, activations: ActivationScheme | None, rotation_block: int
) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(
        scheme, shape, 2, "scale order", has_bias=True, rotation_block=rotation_block, activations=activations
    )
    x = torch.randn(2, shape[1])
    x[:, 5] *= 20
    assert_close(backend.prepare(weights, CPU, dtype)(x), weights, x)


@pytest.mark.parametrize("rotation_block", [0, 64])
@pytest.mark.parametrize("activations", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("run", runs((MXINT4, *FAST_SCHEMES), (torch.bfloat16,), (16, 128)))
def test_every_backend_multiplies_what_the_shared_preparation_gives(
    run: Run, activations: ActivationScheme | None, rotation_block: int
) -> None:
    # In bfloat16 a value is rounded before it is quantized, and may land one step off: the product is what is checked.
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, 2, "scale order", rotation_block=rotation_block, activations=activations)
    x = torch.randn(2, shape[1]).to(dtype)
    prepared = DenseTerms.of(weights, CPU, dtype).prepare_input(x)
    assert_near(backend.prepare(weights, CPU, dtype)(x), expected_product(weights, prepared.double().tolist()), x)


@pytest.mark.parametrize("variant", ["", "serq"])
@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float32", "int8", "int4", "mxint8", "mxint6", "mxint4"])
@pytest.mark.parametrize("run", runs(FAST_SCHEMES[:1], DTYPES, (32, 64)))
def test_factors_of_every_type_are_computed_as_defined(run: Run, factor_dtype: FactorDtype, variant: str) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, 32, variant, factor_dtype=factor_dtype)
    x = torch.randn(2, shape[1]).to(dtype)
    assert_close(backend.prepare(weights, CPU, dtype)(x), weights, x)


def test_the_grid_of_mxint4_loses_nothing_in_bfloat16() -> None:
    weights = random_layer(MXINT4, (16, 64))
    x = torch.eye(64).bfloat16()
    for backend in (TorchInt4Backend(), ReferenceBackend()):
        found = backend.prepare(weights, CPU, torch.bfloat16)(x)
        assert torch.equal(found.double(), expected_output(weights, x).value)


@pytest.mark.parametrize("num_tokens", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("run", runs(FAST_SCHEMES, (torch.bfloat16,), (192, 512), (80, 256), (48, 96), (320, 64)))
def test_larger_layers_agree_with_the_reference_for_few_and_many_tokens(run: Run, num_tokens: int) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, rank=32, variant="scale order", has_bias=True)
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    # the reference in float32 rounds nothing of note; what is left is the bfloat16 of the backend under test
    expected = ReferenceBackend().prepare(weights, CPU, torch.float32)(x.float())
    error = backend.prepare(weights, CPU, dtype)(x).float() - expected
    assert float(error.norm()) <= 2 * torch.finfo(dtype).eps * float(expected.norm())


@pytest.mark.parametrize("run", runs(FAST_SCHEMES, (torch.bfloat16,), (64, 128)))
def test_a_token_does_not_depend_on_its_neighbours_beyond_rounding(run: Run) -> None:
    backend, scheme, dtype, shape = run
    prepared = backend.prepare(random_layer(scheme, shape, rank=8), CPU, dtype)
    x = torch.randn(100, shape[1]).to(dtype)
    alone = torch.cat([prepared(row) for row in torch.split(x, 1)]).float()
    assert float((alone - prepared(x).float()).norm()) <= 2 * torch.finfo(dtype).eps * float(alone.norm())


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("run", runs(FAST_SCHEMES[::3], DTYPES[:2], (32, 64)))
def test_inputs_may_be_strided_or_misaligned(run: Run, num_tokens: int) -> None:
    backend, scheme, dtype, shape = run
    prepared = backend.prepare(random_layer(scheme, shape, rank=4), CPU, dtype)
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    strided = torch.stack((x, -x), -1)[..., 0]
    misaligned = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert not strided.is_contiguous()
    assert misaligned.data_ptr() % 32
    assert torch.allclose(prepared(strided), prepared(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(prepared(misaligned), prepared(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", runs(FAST_SCHEMES[::3], DTYPES[:2], (32, 64)))
def test_no_tokens_give_no_outputs(run: Run) -> None:
    backend, scheme, dtype, shape = run
    prepared = backend.prepare(random_layer(scheme, shape, rank=4, has_bias=True), CPU, dtype)
    assert prepared(torch.empty(0, shape[1], dtype=dtype)).shape == (0, shape[0])


@pytest.mark.parametrize("num_tokens", [2, 70])
@pytest.mark.parametrize("run", runs(FAST_SCHEMES[::3], DTYPES[:2], (32, 64)))
def test_the_input_is_left_as_it_was(run: Run, num_tokens: int) -> None:
    backend, scheme, dtype, shape = run
    weights = random_layer(scheme, shape, rank=4, variant="serq scale order", has_bias=True)
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    copy = x.clone()
    backend.prepare(weights, CPU, dtype)(x)
    assert torch.equal(x, copy)
