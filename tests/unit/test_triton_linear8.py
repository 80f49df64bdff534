"""Triton layers with quantized inputs, in Triton's interpreter, against their definition in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from models.kernels.base import RowReader
from models.kernels.reference import ReferenceBackend
from models.kernels.triton.backend import TritonBackend
from models.kernels.triton.environment import TritonEnvironment
from models.kernels.triton.tiles import ANY_ROWS, Tile
from models.quant.grid import dequantize
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights, RowRanks
from tests.support.linear_oracle import random_layer
from tests.support.triton_oracle import kernel_factors

CPU = torch.device("cpu")
REASON = TritonEnvironment.read().why_not(CPU)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from models.kernels.triton.layer8 import TritonLinear8, step_lengths  # noqa: E402

FLOAT16 = torch.float16
INTERPRETER = TritonBackend(is_interpreter_wanted=True)
# small, so that tiny layers have several of them in every direction; few rows divide the channels too
FEW = Tile("linear8", 80, 4, 4, 16, 16, 64, 4, 4, 1)
MANY = Tile("linear8", 80, 4, ANY_ROWS, 16, 16, 64, 1, 4, 1)
ROW_COUNTS = (3, 18)
# Many rows take the interpreter ten times as long; what the regimes share is tested with few.
EITHER_REGIME = pytest.mark.parametrize("num_rows", [3, pytest.param(18, marks=pytest.mark.slow)])
PER_TOKEN = ActivationScheme(8)
WEIGHTS = tuple(
    QuantScheme(num_bits, group_size, is_symmetric)
    for num_bits, group_size, is_symmetric in product((2, 3, 4, 8), (-1, 32, 64, 128), (False, True))
)
OTHER_WEIGHTS = (QuantScheme(5, 96), QuantScheme(4, 16), *(QuantScheme(4, it, format="mxint") for it in (16, 32)))
ACTIVATIONS = (
    PER_TOKEN,
    ActivationScheme(8, is_symmetric=True),
    ActivationScheme(8, 64),
    ActivationScheme(8, 128, is_symmetric=True),
    ActivationScheme(4),
    ActivationScheme(4, 128, clip_ratio=0.9),
    ActivationScheme(6, 16, format="mxint"),
)


def layer_of(
    scheme: QuantScheme, activations: ActivationScheme, rank: int = 0, variant: str = "", **options: object
) -> LinearWeights:
    """21 output channels; 77 input channels where no group wants another number, else one or three groups."""
    sizes = [it.group_size for it in (scheme, activations) if it.group_size != -1]
    in_features = 77 if not sizes else 192 if 96 in sizes or max(sizes) == 64 else 3 * 32 if max(sizes) <= 32 else 128
    return random_layer(scheme, (21, in_features), rank, variant, activations=activations, **options)  # type: ignore[arg-type]


def some_input(weights: LinearWeights, num_rows: int, dtype: torch.dtype = FLOAT16) -> Tensor:
    x = torch.randn(num_rows, weights.quantized.in_features)
    x[:, 5] *= 9
    return x.to(dtype)


def run(weights: LinearWeights, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
    layer = TritonLinear8.of(weights, CPU, x.dtype)
    return replace(layer, tiles=(FEW, MANY))(x, row_ranks)


def check(weights: LinearWeights, x: Tensor, row_ranks: RowRanks | None = None) -> None:
    """The output is that of the codes which the layer makes of ``x``, within the roundings of its arithmetic.

    Integers are exact. Float32 (2**-24 an operation): one scale for each group and each sum over groups, so as many
    roundings as segments, groups and components, with some to spare for scales, offset and bias; relative to the sum of
    magnitudes, in which code and offset of an input count apart. The layer's type (u): the values that ``lora_down``
    sees, the down-product, and the output.
    """
    layer = TritonLinear8.of(weights, CPU, x.dtype)
    codes, scale, offset, _, _ = layer.input.quantize_input(x)
    in_features, u = weights.quantized.in_features, torch.finfo(x.dtype).eps / 2
    width = in_features // len(scale)
    steps = codes[:, :in_features].double().unflatten(1, (-1, width)) * scale.T[:, :, None].double()
    moved = 0 * steps if offset is None else offset.T[:, :, None].double().expand_as(steps)
    values, sizes = (steps + moved).flatten(1), (steps.abs() + moved.abs()).flatten(1)
    matrix = dequantize(weights.quantized).double()
    exact, error = values @ matrix.T, sizes @ matrix.abs().T
    gamma = (in_features // 16 + 2 * len(scale) + layer.input.rank + 8) * 2.0**-24
    error *= gamma
    if weights.correction is not None:
        up, down = kernel_factors(weights.correction, x.dtype)
        rank = weights.correction.rank
        reduced = values[:, :rank] if down is None else values @ down.T
        size = values[:, :rank].abs() if down is None else values.abs() @ down.abs().T
        if row_ranks is not None:
            reduced, size = row_ranks.keep(reduced), row_ranks.keep(size)
        exact = exact + reduced @ up.T
        # INT8 factors: what is rounded is near the output in size, so float16's least steps count for each component
        error = error + (2.5 * u + gamma + in_features * 2.0**-24) * (size @ up.abs().T) + rank * 2.0**-24
    if weights.bias is not None:
        bias = weights.bias.to(x.dtype).double()
        exact, error = exact + bias, error + gamma * bias.abs()
    bound = error + u * (exact.abs() + error) + 2.0**-24
    found = layer_output(layer, x, row_ranks)
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= bound).all()


def layer_output(layer: TritonLinear8, x: Tensor, row_ranks: RowRanks | None) -> Tensor:
    return replace(layer, tiles=(FEW, MANY))(x, row_ranks)


@pytest.mark.parametrize("scheme", WEIGHTS + OTHER_WEIGHTS, ids=str)
def test_weights_of_every_scheme_are_multiplied_as_defined(scheme: QuantScheme) -> None:
    # every width meets every activation scheme and both regimes in turn
    number = (WEIGHTS + OTHER_WEIGHTS).index(scheme)
    activations = ACTIVATIONS[number % len(ACTIVATIONS)]
    in_features = scheme.group_size
    if activations.group_size > in_features != -1 and in_features in {32, 64, 96}:
        activations = PER_TOKEN
    weights = layer_of(scheme, activations)
    check(weights, some_input(weights, ROW_COUNTS[number % 2]))


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", [QuantScheme(4, 128), QuantScheme(8, -1)], ids=str)
def test_inputs_of_every_scheme_are_multiplied_as_defined(scheme: QuantScheme, activations: ActivationScheme) -> None:
    weights = layer_of(scheme, activations, 8, "scale", has_bias=True)
    check(weights, some_input(weights, 3))


@EITHER_REGIME
@pytest.mark.parametrize("variant", ["order", "serq order"])
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_low_rank_terms_of_every_rank_are_computed_as_defined(rank: int, variant: str, num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, -1), PER_TOKEN, rank, variant)
    check(weights, some_input(weights, num_rows))


@pytest.mark.parametrize(("rank", "num_rows"), [(8, 3), (8, 5), (32, 5), (64, 3)])
def test_int8_factors_of_every_rank_give_what_they_stand_for(rank: int, num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, -1), PER_TOKEN, rank, "order", factor_dtype="int8")
    # sums of codes of lora_down far beyond float16
    check(weights, 100 * some_input(weights, num_rows))


@pytest.mark.parametrize("num_rows", [3, 5])
def test_every_row_gets_as_many_components_of_int8_factors_as_it_asks_for(num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, 32), ActivationScheme(8, 32), 24, factor_dtype="int8")
    x = some_input(weights, num_rows)
    check(weights, x, RowRanks(torch.tensor([17, 0, 24, 90])[torch.arange(num_rows) % 4], 90))


@pytest.mark.parametrize("block", [32, 64])
def test_rotated_inputs_are_multiplied_as_defined(block: int) -> None:
    weights = layer_of(QuantScheme(4, 64), PER_TOKEN, 8, "scale order", rotation_block=block, has_bias=True)
    check(weights, some_input(weights, 3))


@pytest.mark.parametrize("variant", ["", "serq"])
@EITHER_REGIME
def test_every_row_gets_as_many_components_as_it_asks_for(variant: str, num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, 32), ActivationScheme(8, 32), 24, variant)
    x = some_input(weights, num_rows)
    check(weights, x, RowRanks(torch.tensor([17, 0, 24, 90])[torch.arange(num_rows) % 4], 90))
    nothing = RowRanks(torch.zeros(num_rows, dtype=torch.int64), 0)
    assert torch.equal(run(weights, x, nothing), run(replace(weights, correction=None), x))


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("activations", [PER_TOKEN, ActivationScheme(4, 64, is_symmetric=True)], ids=str)
def test_the_layer_is_that_of_the_reference_backend(activations: ActivationScheme, num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, 64), activations, 16, "scale order", has_bias=True)
    layer = INTERPRETER.prepare(weights, CPU, FLOAT16)
    assert isinstance(layer, TritonLinear8)
    x = some_input(weights, num_rows)
    # the same codes; the reference rounds inputs, weights and low-rank term to float16, each by 2**-11 of itself
    expected = ReferenceBackend().prepare(weights, CPU, FLOAT16)(x).double()
    error = (layer_output(layer, x, None).double() - expected).norm()
    assert error <= 3 * 2.0**-11 * expected.norm()


def test_integer_sums_of_whole_numbers_are_exact() -> None:
    # scales of one: nothing is rounded anywhere, whatever the order of summation
    weights = layer_of(QuantScheme(8, -1), ActivationScheme(8, is_symmetric=True))
    weights = replace(weights, quantized=replace(weights.quantized, scale=torch.ones_like(weights.quantized.scale)))
    x = torch.randint(-127, 128, (18, 77)).float()
    x[:, 0] = 127
    expected = x.double() @ dequantize(weights.quantized).double().T
    for num_rows in ROW_COUNTS:
        assert torch.equal(run(weights, x[:num_rows]).double(), expected[:num_rows])


def test_layers_that_integers_cannot_express_take_16_bit_inputs() -> None:
    for weights in (
        random_layer(QuantScheme(4, 32, format="nf4"), (21, 64), activations=PER_TOKEN),
        random_layer(QuantScheme(4, 32), (21, 64), activations=ActivationScheme(4, 32, format="mxfp4")),
        random_layer(QuantScheme(4, 32), (21, 64)),
    ):
        layer = INTERPRETER.prepare(weights, CPU, FLOAT16)
        assert type(layer).__name__ == "TritonLinear16"
        x = some_input(weights, 3)
        expected = ReferenceBackend().prepare(weights, CPU, FLOAT16)(x).double()
        assert (layer(x).double() - expected).norm() <= 2.0**-10 * expected.norm()


@EITHER_REGIME
def test_a_call_gives_the_same_bits_every_time_and_inputs_may_be_strided(num_rows: int) -> None:
    weights = layer_of(QuantScheme(2, 32), PER_TOKEN, 8)
    x = some_input(weights, num_rows)
    strided = torch.stack((x, -x), -1)[..., 0]
    assert torch.equal(run(weights, x), run(weights, strided))
    assert run(weights, x[:0]).shape == (0, 21)


def test_single_rows_are_those_of_the_dequantized_weight_and_every_byte_is_counted() -> None:
    weights = layer_of(QuantScheme(4, 64), ActivationScheme(8, 64), 8, "scale order", has_bias=True)
    layer = TritonLinear8.of(weights, CPU, FLOAT16)
    assert isinstance(layer, RowReader)
    indices = torch.tensor([20, 0, 3, 3])
    assert torch.equal(layer.rows(indices), dequantize(weights.quantized)[indices])
    tensors = [layer.column_sums, layer.lora_up, layer.bias, layer.input.divisor, layer.input.channel_order]
    tensors.append(layer.input.lora_down)
    assert layer.nbytes == layer.weight.nbytes + sum(it.nbytes for it in tensors if it is not None)


@pytest.mark.parametrize(
    ("block_k", "group", "input_group", "expected"),
    [
        (128, 0, 0, (128, 128)),
        (128, 64, 0, (64, 64)),
        (128, 96, 0, (32, 32)),
        (64, 128, 256, (64, 64)),
        (128, 0, 16, (32, 16)),
        (128, 192, 32, (32, 32)),
    ],
)
def test_steps_lie_within_groups(block_k: int, group: int, input_group: int, expected: tuple[int, int]) -> None:
    assert step_lengths(block_k, group, input_group) == expected
