"""Triton layers with 16-bit inputs, in Triton's interpreter, against their definition in float64."""

import logging
from dataclasses import fields, is_dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.artifact.execution import describe_backends, warn_if_missing
from models.artifact.load import load_artifact
from models.errors import KernelError
from models.kernels import default_backends, get_backends
from models.kernels.base import LinearSpec, RowReader
from models.kernels.reference import ReferenceBackend
from models.kernels.triton.backend import TritonBackend
from models.kernels.triton.environment import MISSING, TritonEnvironment
from models.kernels.triton.tiles import ANY_ROWS, Tile
from models.llama.batch import Batch
from models.llama.model import LlamaForCausalLM
from models.quant.grid import dequantize
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights, RowRanks
from tests.support.artifact_builder import LinearKind, tiny_model, write_artifact
from tests.support.linear_oracle import random_layer
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files
from tests.support.triton_oracle import assert_bounded, bounded_output

CPU = torch.device("cpu")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
INTERPRETER = TritonBackend(is_interpreter_wanted=True)
# small, so that tiny layers have several of them in every direction
ROW = Tile("linear16", 80, 4, 1, 1, 16, 64, 4, 4, 1)
FEW = Tile("linear16", 80, 4, 4, 16, 16, 64, 4, 4, 1)
MANY = Tile("linear16", 80, 4, ANY_ROWS, 16, 16, 64, 1, 4, 1)
ROW_COUNTS = (1, 3, 5)
SCHEMES = tuple(
    QuantScheme(num_bits, group_size, is_symmetric)
    for num_bits, group_size, is_symmetric in product((2, 3, 4, 5, 8), (-1, 32, 64, 128), (False, True))
)
FORMATS = (
    *(QuantScheme(bits, size, format="mxint") for bits, size in ((3, 16), (4, 32), (6, 16), (8, 32))),
    QuantScheme(4, 32, format="mxfp4"),
    QuantScheme(4, 32, format="nf4"),
    QuantScheme(4, 96),
    QuantScheme(3, 16, True),
)

pytestmark = pytest.mark.skipif(
    TritonEnvironment.read().why_not(CPU) is not None, reason=f"{TritonEnvironment.read().why_not(CPU)}"
)


def run(weights: LinearWeights, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
    """The layer in small tiles: 1 row on its own, up to 4 split, more tiled."""
    layer = INTERPRETER.prepare(weights, CPU, x.dtype)
    return replace(layer, tiles=(ROW, FEW, MANY))(x, row_ranks)  # type: ignore[type-var]


def check(weights: LinearWeights, x: Tensor, row_ranks: RowRanks | None = None) -> None:
    expected = bounded_output(weights, x, row_ranks, is_truncating=True)
    assert_bounded(run(weights, x, row_ranks), expected, x.dtype, is_truncating=True)


def layer_of(scheme: QuantScheme, rank: int = 0, variant: str = "", *, has_bias: bool = False) -> LinearWeights:
    """Odd sizes: 21 output channels, and 77 or an odd number of groups of input channels."""
    length = 77 if scheme.group_size == -1 else scheme.group_size * (3 if scheme.group_size <= 32 else 1)
    return random_layer(scheme, (21, length), rank, variant, has_bias)


@pytest.mark.parametrize("scheme", SCHEMES + FORMATS, ids=str)
def test_every_scheme_is_computed_as_defined(scheme: QuantScheme) -> None:
    # types and regimes take turns: every width of codes meets all six pairs
    number = (SCHEMES + FORMATS).index(scheme)
    weights = layer_of(scheme)
    x = torch.randn(ROW_COUNTS[number % 3], weights.quantized.in_features)
    check(weights, x.to((BFLOAT16, FLOAT16)[number // 3 % 2]))


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("variant", ["", "serq"])
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_low_rank_terms_of_every_rank_are_computed_as_defined(rank: int, variant: str, num_rows: int) -> None:
    check(layer_of(QuantScheme(4, -1), rank, variant), torch.randn(num_rows, 77).half())


@pytest.mark.parametrize(("rank", "num_rows"), [(76, 1), (70, 3), (19, 18), (70, 18)])
def test_a_rank_of_several_tiles_or_of_no_round_number_is_computed_as_defined(rank: int, num_rows: int) -> None:
    check(layer_of(QuantScheme(4, -1), rank), torch.randn(num_rows, 77).bfloat16())


@pytest.mark.parametrize(
    ("variant", "num_rows"),
    [("scale", 3), ("order", 5), *product(("scale order", "serq scale order"), ROW_COUNTS)],
)
def test_inputs_are_divided_and_gathered_in_the_kernels(variant: str, num_rows: int) -> None:
    check(layer_of(QuantScheme(3, 32), 8, variant, has_bias=True), torch.randn(num_rows, 96).half())


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("activations", [None, ActivationScheme(4, 32, format="mxfp4")], ids=str)
def test_rotated_and_quantized_inputs_are_prepared_before_the_kernels(
    activations: ActivationScheme | None, num_rows: int
) -> None:
    weights = random_layer(QuantScheme(4, 32), (16, 64), 8, "scale order", rotation_block=16, activations=activations)
    check(weights, torch.randn(num_rows, 64).half())


@pytest.mark.parametrize("variant", ["", "serq"])
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_every_row_gets_as_many_components_as_it_asks_for(variant: str, num_rows: int) -> None:
    weights = layer_of(QuantScheme(4, 32), 24, variant)
    x = torch.randn(num_rows, 96).half()
    per_row = torch.tensor([17, 0, 24, 90])[torch.arange(num_rows) % 4]
    check(weights, x, RowRanks(per_row, 90))
    nothing = RowRanks(torch.zeros(num_rows, dtype=torch.int64), 0)
    assert torch.equal(run(weights, x, nothing), run(replace(weights, correction=None), x))


@pytest.mark.parametrize("factor_dtype", ["float32", "int4", "mxint8"])
def test_stored_factors_of_other_types_are_taken(factor_dtype: str) -> None:
    weights = random_layer(QuantScheme(4, 32), (32, 64), 32, factor_dtype=factor_dtype)  # type: ignore[arg-type]
    check(weights, torch.randn(3, 64).bfloat16())


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_int8_factors_of_every_rank_give_what_they_stand_for(rank: int, num_rows: int) -> None:
    weights = random_layer(QuantScheme(4, -1), (21, 77), rank, "scale" if rank == 32 else "", factor_dtype="int8")
    x = torch.randn(num_rows, 77).to(FLOAT16 if num_rows == 3 else BFLOAT16)
    layer = INTERPRETER.prepare(weights, CPU, x.dtype)
    assert layer.nbytes == resident_bytes(layer)
    check(weights, x)


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_every_row_gets_as_many_components_of_int8_factors_as_it_asks_for(num_rows: int) -> None:
    weights = random_layer(QuantScheme(4, 32), (21, 96), 24, factor_dtype="int8")
    x = torch.randn(num_rows, 96).half()
    check(weights, x, RowRanks(torch.tensor([17, 0, 24, 90])[torch.arange(num_rows) % 4], 90))


def test_sums_of_codes_may_exceed_float16() -> None:
    weights = random_layer(QuantScheme(4, -1), (21, 77), 8, factor_dtype="int8")
    x = torch.full((5, 77), 60.0).half() * torch.randint(0, 2, (77,)).mul(2).sub(1).half()
    for num_rows in ROW_COUNTS:
        check(weights, 8 * x[:num_rows])


@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_a_call_gives_the_same_bits_every_time_and_inputs_may_be_strided(num_rows: int) -> None:
    weights = layer_of(QuantScheme(2, 32), 8)
    x = torch.randn(num_rows, 96).half()
    strided = torch.stack((x, -x), -1)[..., 0]
    assert torch.equal(run(weights, x), run(weights, strided))


def test_no_rows_give_no_outputs() -> None:
    assert run(layer_of(QuantScheme(4, 32), 8), torch.empty(0, 96).bfloat16()).shape == (0, 21)


def test_the_tiles_of_the_table_give_the_same_layer() -> None:
    weights = random_layer(QuantScheme(4, 64), (130, 256), 32, "scale", has_bias=True)
    for num_rows in (1, 5):
        x = torch.randn(num_rows, 256).half()
        found = INTERPRETER.prepare(weights, CPU, FLOAT16)(x)
        assert_bounded(found, bounded_output(weights, x, is_truncating=True), FLOAT16, is_truncating=True)


def resident_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    return sum(resident_bytes(getattr(value, it.name)) for it in fields(value)) if is_dataclass(value) else 0


@pytest.mark.parametrize("num_bits", [3, 4])
def test_single_rows_are_those_of_the_dequantized_weight_and_every_byte_is_counted(num_bits: int) -> None:
    weights = random_layer(QuantScheme(num_bits, 64), (70, 128), 8, "scale order", has_bias=True)
    layer = INTERPRETER.prepare(weights, CPU, BFLOAT16)
    assert isinstance(layer, RowReader)
    indices = torch.tensor([69, 0, 3, 3])
    assert torch.equal(layer.rows(indices), dequantize(weights.quantized)[indices])
    assert layer.nbytes == resident_bytes(layer)
    assert layer.nbytes < 1.1 * ReferenceBackend().prepare(weights, CPU, BFLOAT16).nbytes


SPEC = LinearSpec(QuantScheme(4, 64), 128, 64, 8, False, False, torch.device("cuda"), BFLOAT16)


def test_a_layer_on_the_cpu_is_interpreted_only_for_those_who_name_the_backend() -> None:
    spec = replace(SPEC, device=CPU)
    (named,) = get_backends("triton")
    assert named.unsupported(spec) is None
    (automatic,) = (backend for backend in default_backends() if backend.name == "triton")
    assert automatic.unsupported(spec) == "runs on CUDA devices only, not on cpu"
    with pytest.raises(KernelError, match="triton: runs on CUDA devices only, not on cpu"):
        automatic.prepare(layer_of(QuantScheme(4, 32)), CPU, BFLOAT16)


def test_the_backend_says_why_it_cannot_run_a_layer() -> None:
    assert "float32" in (INTERPRETER.unsupported(replace(SPEC, device=CPU, dtype=torch.float32)) or "")
    missing = TritonBackend(environment=TritonEnvironment(None, False))
    assert missing.unsupported(SPEC) == "triton is not installed; it comes with the extra: pip install 'qerve[gpu]'"


def test_a_network_runs_on_the_backend_as_on_the_reference(tmp_path: Path) -> None:
    model = tiny_model(LinearKind(rank=8, has_input_scale=True), vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    write_artifact(tmp_path / "art", model, tokenizer_files=tokenizer_files())
    logits, batch = {}, Batch.uncached([[5, 17, 301]])
    for name in ("triton", "reference"):
        loaded = load_artifact(tmp_path / "art", dtype=BFLOAT16, backend=name)
        assert isinstance(loaded.model, LlamaForCausalLM)
        assert {selection.backend.name for selection in loaded.selections.values()} == {name}
        with torch.inference_mode():
            logits[name] = loaded.model.logits(loaded.model(batch)).double()
    # bfloat16 keeps 8 bits: a few rounding steps of the largest logit, through a layer
    assert (logits["triton"] - logits["reference"]).abs().max() < 16 * 2**-8 * logits["reference"].abs().max()


@pytest.mark.parametrize(
    ("environment", "words"),
    [(TritonEnvironment("3.9.0", False), "3.9.0, on CUDA devices"), (TritonEnvironment(None, False), MISSING)],
)
def test_what_there_is_of_triton_is_shown(environment: TritonEnvironment, words: str) -> None:
    assert describe_backends([TritonBackend(environment=environment)]) == {"triton": words}


def test_a_gpu_without_triton_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    missing = TritonBackend(environment=TritonEnvironment(None, False))
    with caplog.at_level(logging.WARNING):
        warn_if_missing([missing], CPU)
        assert not caplog.records
        warn_if_missing([missing], torch.device("cuda"))
    assert [MISSING in record.message for record in caplog.records] == [True]
