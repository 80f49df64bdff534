"""One contract over all backends: against a float64 loop on tiny shapes, against the reference on larger ones."""

import itertools

import pytest
import torch
from torch import Tensor

from models.config import QuantScheme
from models.kernels import default_backends
from models.kernels.base import KernelBackend, LinearSpec
from models.kernels.reference import ReferenceBackend
from models.types import LinearWeights
from tests.support.linear_oracle import expected_output, random_layer

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = tuple(
    QuantScheme(num_bits, group_size, is_symmetric)
    for num_bits, group_size, is_symmetric in itertools.product(range(2, 9), (-1, 32, 64, 128), (False, True))
)
FAST_SCHEMES = (QuantScheme(4, 32), QuantScheme(4, -1), QuantScheme(4, -1, True), QuantScheme(8, -1, True))
VARIANTS = ("", "scale", "order", "scale order", "serq", "serq scale order")

Run = tuple[KernelBackend, QuantScheme, torch.dtype, tuple[int, int]]


def runs(schemes: tuple[QuantScheme, ...], dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, int]) -> list[object]:
    """Every combination that a backend says it can run, as test parameters."""
    parameters = []
    for backend, scheme, dtype, shape in itertools.product(default_backends(), schemes, dtypes, shapes):
        spec = LinearSpec(scheme, shape[1], shape[0], 0, False, False, CPU, dtype)
        if backend.unsupported(spec) is None:
            parity = "sym" if scheme.is_symmetric else "asym"
            name = f"{backend.name} int{scheme.num_bits} g{scheme.group_size} {parity} {dtype} {shape}"
            parameters.append(pytest.param((backend, scheme, dtype, shape), id=name))
    return parameters


def assert_close(given: Tensor, weights: LinearWeights, x: Tensor) -> None:
    """Within the rounding errors of the dtype: at most seven roundings lie between codes and output (input divided,
    scale, weight, product, bias, down-product, sum), each relative to the sum of magnitudes; sums are in float32.
    """
    expected = expected_output(weights, x)
    rounding = torch.finfo(x.dtype).eps / 2
    summing = x.shape[1] * torch.finfo(torch.float32).eps
    assert given.dtype == x.dtype
    error = (given.double() - expected.value).abs()
    assert (error <= (7 * rounding + summing) * expected.magnitude + 1e-6).all()
    # random signs: on average roundings cancel, and a wrong scale, zero point or order cannot hide in the sum
    assert float(error.norm()) <= (7 * rounding + summing) * float(expected.value.norm())


def test_every_backend_is_under_test() -> None:
    covered = {(run.values[0][0].name, run.values[0][1]) for run in runs(SCHEMES, DTYPES, (16, 128))}
    assert {scheme for name, scheme in covered if name == "reference"} == set(SCHEMES)
    assert {scheme for name, scheme in covered if name == "torch-int4"} == {s for s in SCHEMES if s.num_bits == 4}
    assert {scheme for name, scheme in covered if name == "torch-int8"} == {QuantScheme(8, -1, True)}


@pytest.mark.parametrize("run", runs(SCHEMES, DTYPES, (16, 128)))
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
