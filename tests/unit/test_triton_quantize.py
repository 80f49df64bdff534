"""The pass over a layer's input, in Triton's interpreter: codes, scales, sums and the down-projection."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.errors import KernelError
from models.kernels.dense_terms import DenseTerms
from models.kernels.triton.environment import TritonEnvironment
from models.kernels.triton.integer import has_offset, integer_obstacle, rounding_obstacle
from models.quant.activation import quantize_activations
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights
from tests.support.linear_oracle import random_layer

REASON = TritonEnvironment.read().why_not(torch.device("cpu"))
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from models.kernels.triton import inputs  # noqa: E402
from models.kernels.triton.inputs import FusedInput, IntegerInput  # noqa: E402

CPU = torch.device("cpu")
WEIGHTS = QuantScheme(4, -1)
SCHEMES = (
    ActivationScheme(8),
    ActivationScheme(8, is_symmetric=True),
    ActivationScheme(8, 128),
    ActivationScheme(8, 64, clip_ratio=0.9),
    ActivationScheme(4),
    ActivationScheme(4, 64),
    ActivationScheme(4, 32, is_symmetric=True, clip_ratio=0.85),
    ActivationScheme(7, clip_ratio=0.01),
    ActivationScheme(2, 64),
    ActivationScheme(6, 16, format="mxint"),
    ActivationScheme(8, 32, format="mxint", exponent="ceil"),
)
# a token a program; 16 tokens a program, in tiles of 128 channels
REGIMES = pytest.mark.parametrize("few_tokens", [64, 0], ids=["few", "many"])


@pytest.fixture(autouse=True)
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few tokens or many, whatever their number."""
    if "few_tokens" in request.fixturenames:
        monkeypatch.setattr(inputs, "FEW_TOKENS", request.getfixturevalue("few_tokens"))
    yield


def layer(in_features: int, rank: int = 0, variant: str = "", **options: object) -> LinearWeights:
    return random_layer(WEIGHTS, (8, in_features), rank, variant, **options)  # type: ignore[arg-type]


def some_input(num_tokens: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Outliers, zeros in the second token, one huge and one tiny token; halves, so that there are ties."""
    x = torch.randn(num_tokens, in_features).mul_(16).round_().div_(2)
    x[:, 3] *= 20
    x[1] = 0
    x[2] *= 2.0**-20
    return x.to(dtype)


def groups_of(values: Tensor, scheme: ActivationScheme) -> Tensor:
    """(tokens, channels) -> (tokens, groups, length)."""
    return values.unflatten(1, (-1, values.shape[1] if scheme.group_size == -1 else scheme.group_size))


def dequantized(found: IntegerInput, scheme: ActivationScheme, in_features: int) -> Tensor:
    """What codes, scales and offsets say, float64."""
    groups = groups_of(found.codes[:, :in_features].double(), scheme)
    values = groups * found.scale.T[:, :, None].double()
    return (values if found.offset is None else values + found.offset.T[:, :, None].double()).flatten(1)


@REGIMES
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_reference(scheme: ActivationScheme, few_tokens: int) -> None:
    in_features = 77 if scheme.group_size == -1 else 256
    x = some_input(3, in_features, torch.float32)
    fused = FusedInput.of(layer(in_features, activations=scheme), CPU, x.dtype)
    found = fused.quantize_input(x, 32)
    scale = found.scale.T[:, :, None]
    steps = groups_of(quantize_activations(x, scheme), scheme) / scale
    expected = steps.round()
    assert (steps - expected).abs().max() < 1e-3  # the scales are the reference's: whole numbers of steps
    moved = 0 if found.offset is None else (found.offset.T[:, :, None] / scale).round()
    assert (found.offset is not None) == has_offset(scheme)
    assert torch.equal(groups_of(found.codes[:, :in_features].float(), scheme), expected - moved)
    assert not found.codes[:, in_features:].any()
    assert found.sums is not None
    assert torch.equal(found.sums.T.long(), found.codes.long().unflatten(1, (-1, 32)).sum(-1))


@REGIMES
@pytest.mark.parametrize("scheme", [None, SCHEMES[0], SCHEMES[5]], ids=str)
@pytest.mark.parametrize("variant", ["serq order", "scale order"])
def test_values_and_their_down_projection_are_those_of_the_reference(
    variant: str, scheme: ActivationScheme | None, few_tokens: int
) -> None:
    rank, in_features, dtype = 12, 128, torch.float16
    weights = layer(in_features, rank, variant, activations=scheme)
    x = some_input(3, in_features, dtype)
    expected = DenseTerms.of(weights, CPU, dtype).prepare_input(x)
    fused = FusedInput.of(weights, CPU, dtype)
    prepared, reduced = fused.prepare_input(x)
    assert torch.equal(prepared, expected)
    results = [reduced] if scheme is None else [reduced, fused.quantize_input(x).reduced]
    for result in results:
        assert result is not None
        check_reduced(result, expected, fused.lora_down)


def check_reduced(result: Tensor, expected: Tensor, lora_down: Tensor | None) -> None:
    """Sums of float32, rounded once to float16: error 2**-11, and 2**-24 of the magnitudes for each term."""
    rank, values = result.shape[1], expected.double()
    if lora_down is None:
        assert torch.equal(result, expected[:, :rank])
        return
    exact, size = values @ lora_down.double().T, values.abs() @ lora_down.double().abs().T
    error = (result.double() - exact).abs()
    assert (error <= 2.0**-11 * exact.abs() + 2.0**-24 * (values.shape[1] + 1) * size + 2.0**-25).all()


@REGIMES
def test_a_rank_beyond_one_program_and_one_that_is_no_multiple_of_anything(few_tokens: int) -> None:
    for rank in (9, 70) if few_tokens == 0 else (9,):
        fused = FusedInput.of(layer(128, rank), CPU, torch.float16)
        x = some_input(3, 128, torch.float16)
        same, reduced = fused.prepare_input(x)
        assert torch.equal(same, x)
        assert reduced is not None
        check_reduced(reduced, x, fused.lora_down)


@REGIMES
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_rotated_integers_are_exact(block: int, few_tokens: int) -> None:
    # sums of whole numbers have no order; 1 / sqrt(block) is exact for powers of four, else one rounding remains
    dtype = torch.float32 if block == 128 else torch.float16
    weights = layer(256, 8, "order", rotation_block=block, activations=ActivationScheme(8))
    x = torch.randint(-8, 9, (3, 256)).to(dtype)
    expected = DenseTerms.of(weights, CPU, dtype).prepare_input(x)
    prepared, _ = FusedInput.of(weights, CPU, dtype).prepare_input(x)
    assert torch.allclose(prepared, expected, rtol=0 if dtype == torch.float16 else 1e-6, atol=0)


@REGIMES
def test_rotated_codes_differ_from_the_references_by_one_step_and_only_at_ties(few_tokens: int) -> None:
    scheme = ActivationScheme(8, is_symmetric=True)
    weights = layer(256, rotation_block=128, activations=scheme)
    x = torch.randn(6, 256)
    found = FusedInput.of(weights, CPU, x.dtype).quantize_input(x)
    rotated = DenseTerms.of(weights, CPU, x.dtype).inputs.apply(x)
    steps = rotated / found.scale.T
    # float32 sums of 128 terms in another order: 128 * 2**-24 of the norm, which is below 127 * sqrt(256) steps
    slack = 128 * 2.0**-24 * 127 * 16
    assert ((found.codes[:, :256] - steps).abs() <= 0.5 + slack).all()


def test_orders_that_the_kernel_does_not_know_are_rotated_in_torch() -> None:
    weights = layer(96, 8, "scale order", rotation_block=12, activations=ActivationScheme(4, 32))
    x = some_input(3, 96, torch.float16)
    prepared, _ = FusedInput.of(weights, CPU, x.dtype).prepare_input(x)
    assert torch.equal(prepared, DenseTerms.of(weights, CPU, x.dtype).prepare_input(x))


@pytest.mark.parametrize("scheme", [ActivationScheme(4, 32, format="mxfp4"), ActivationScheme(8, 96)], ids=str)
def test_grids_that_the_kernel_does_not_know_are_rounded_in_torch(scheme: ActivationScheme) -> None:
    weights = layer(192, 8, "scale order", activations=scheme)
    x = some_input(3, 192, torch.float16)
    fused = FusedInput.of(weights, CPU, x.dtype)
    prepared, reduced = fused.prepare_input(x)
    assert torch.equal(prepared, DenseTerms.of(weights, CPU, x.dtype).prepare_input(x))
    assert reduced is not None
    assert rounding_obstacle(scheme) is not None
    check_reduced(reduced, prepared, fused.lora_down)


@REGIMES
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_its_own_token_only(value: float, few_tokens: int) -> None:
    scheme = ActivationScheme(8, 64)
    fused = FusedInput.of(layer(128, activations=scheme), CPU, torch.float32)
    x = some_input(3, 128, torch.float32)
    clean = fused.quantize_input(x)
    x[1, 70] = value
    found = fused.quantize_input(x)
    assert found.scale.isnan().nonzero().tolist() == [[1, 1]]
    assert torch.equal(found.codes[[0, 2]], clean.codes[[0, 2]])


def test_an_input_that_nothing_happens_to_is_not_copied() -> None:
    x = torch.randn(3, 64).half()
    prepared, reduced = FusedInput.of(layer(64, 8, "serq"), CPU, x.dtype).prepare_input(x)
    assert prepared is x
    assert reduced is not None
    assert torch.equal(reduced, x[:, :8])
    assert FusedInput.of(layer(64), CPU, x.dtype).prepare_input(x) == (x, None)
    with pytest.raises(KernelError, match="not quantized"):
        FusedInput.of(layer(64), CPU, x.dtype).quantize_input(x)


@pytest.mark.parametrize(
    ("scheme", "activations", "in_features", "words"),
    [
        (QuantScheme(4, 64), None, 64, "not quantized"),
        (QuantScheme(4, 64, format="nf4"), ActivationScheme(8), 64, "not nf4"),
        (QuantScheme(4, 32, format="mxfp4"), ActivationScheme(8), 64, "not mxfp4"),
        (QuantScheme(4, 64), ActivationScheme(4, 32, format="mxfp4"), 64, "not to mxfp4"),
        (QuantScheme(4, 64), ActivationScheme(8, 96), 192, "power of two, not 96"),
        (QuantScheme(4, 64), ActivationScheme(8), 1 << 17, "do not fit 32 bits"),
    ],
)
def test_what_the_integer_kernels_do_not_take_is_said_in_words(
    scheme: QuantScheme, activations: ActivationScheme | None, in_features: int, words: str
) -> None:
    assert words in (integer_obstacle(scheme, activations, in_features) or "")
    assert integer_obstacle(QuantScheme(3, 16, format="mxint"), ActivationScheme(8), in_features % 65536) is None
