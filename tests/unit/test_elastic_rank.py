"""Rows that get the first components of each correction: as layers with truncated factors give, in any company."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.kernels.base import KernelBackend, PreparedLinear
from models.kernels.dequantized import DequantizedBackend
from models.kernels.native.backend import NativeBackend
from models.kernels.native.inputs import ActivationBits
from models.kernels.reference import ReferenceBackend
from models.kernels.torch_int4 import TorchInt4Backend
from models.kernels.torch_int8 import TorchInt8Backend
from models.llama.batch import ALL_COMPONENTS, Batch, SequenceSpan, TokenBatch, ranks_of_rows
from models.llama.network import Network
from models.quant.grid import dense_factors
from models.scheme import ActivationScheme, QuantScheme
from models.types import Correction, LinearWeights, RowRanks
from tests.support.artifact_builder import LinearKind, TinyModel
from tests.support.linear_oracle import expected_output, random_layer
from tests.support.native import expected_product, needs_native, rounded_inputs, runtime
from tests.support.native_network import TOKENS, Saved, logits_of, network_of, save

CPU = torch.device("cpu")
RANK = 40
RANKS = [0, 1, 31, 32, 33, RANK, ALL_COMPONENTS]
SHAPE = (32, 128)
TORCH_BACKENDS: tuple[tuple[KernelBackend, QuantScheme, torch.dtype], ...] = (
    (ReferenceBackend(), QuantScheme(3, 32), torch.float32),
    (ReferenceBackend(), QuantScheme(4, 64), torch.bfloat16),
    (DequantizedBackend(), QuantScheme(4, 64), torch.float32),
    (TorchInt4Backend(), QuantScheme(4, 32), torch.bfloat16),
    (TorchInt8Backend(), QuantScheme(8, -1, is_symmetric=True), torch.bfloat16),
)
VARIANTS = ("", "scale order", "serq scale order")


def row_ranks(ranks: Sequence[int]) -> RowRanks:
    return RowRanks(torch.tensor(ranks), max(ranks))


def truncated(weights: LinearWeights, rank: int) -> LinearWeights:
    """``weights`` with the first ``rank`` components of its correction and no others."""
    if weights.correction is None or rank >= weights.correction.rank:
        return weights
    if rank == 0:
        return replace(weights, correction=None)
    lora_up, lora_down = dense_factors(weights.correction)
    down = None if lora_down is None else lora_down[:rank].float().contiguous()
    return replace(weights, correction=Correction(lora_up[:, :rank].float().contiguous(), down))


def bfloat16_step(dtype: torch.dtype) -> float:
    """Seven roundings and a sum, as in the tests of the backends."""
    return 9 * torch.finfo(dtype).eps / 2 + SHAPE[1] * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("factor_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("backend", "scheme", "dtype"), TORCH_BACKENDS, ids=lambda item: getattr(item, "name", str(item))
)
def test_rows_on_torch_are_those_of_truncated_factors(
    backend: KernelBackend, scheme: QuantScheme, dtype: torch.dtype, factor_dtype: str, variant: str
) -> None:
    torch.manual_seed(0)
    rank = 32 if factor_dtype == "int8" else RANK
    weights = random_layer(scheme, SHAPE, rank, variant, True, factor_dtype=factor_dtype)  # type: ignore[arg-type]
    prepared = backend.prepare(weights, CPU, dtype)
    x = torch.randn(len(RANKS), SHAPE[1]).to(dtype)
    found = prepared(x, row_ranks(RANKS))
    assert found.dtype == dtype
    for row, count in enumerate(RANKS):
        expected = expected_output(truncated(weights, count), x[row : row + 1])
        whole = expected_output(weights, x[row : row + 1]).magnitude
        error = (found[row].double() - expected.value[0]).abs()
        assert (error <= bfloat16_step(dtype) * whole[0] + 1e-6).all()
        alone = prepared(x[row : row + 1], row_ranks([count]))
        assert ((alone - found[row]).abs() <= bfloat16_step(dtype) * whole[0]).all()


@pytest.mark.parametrize("backend", [ReferenceBackend(), DequantizedBackend()], ids=lambda backend: backend.name)
def test_all_components_are_the_layer_as_it_is(backend: KernelBackend) -> None:
    weights, x = random_layer(QuantScheme(4, 64), SHAPE, RANK), torch.randn(5, SHAPE[1])
    prepared = backend.prepare(weights, CPU, torch.float32)
    assert torch.equal(prepared(x, row_ranks([RANK] * 5)), prepared(x))
    assert torch.equal(prepared(x, row_ranks([ALL_COMPONENTS] * 5)), prepared(x))


def test_a_layer_without_correction_takes_no_notice() -> None:
    x = torch.randn(3, SHAPE[1])
    for backend in (ReferenceBackend(), DequantizedBackend()):
        prepared = backend.prepare(random_layer(QuantScheme(4, 64), SHAPE), CPU, torch.float32)
        assert torch.equal(prepared(x, row_ranks([0, 5, 9])), prepared(x))


def native_layer(weights: LinearWeights, bits: ActivationBits) -> PreparedLinear:
    return NativeBackend(bits, runtime()).prepare(weights, CPU, torch.float32)


@needs_native
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activations", [None, ActivationScheme(8, 32)], ids=str)
def test_rows_on_the_kernels_are_as_defined(
    activations: ActivationScheme | None, variant: str, bits: ActivationBits
) -> None:
    torch.manual_seed(1)
    weights = random_layer(QuantScheme(4, 32), SHAPE, RANK, variant, True, activations=activations)
    x = torch.randn(len(RANKS), SHAPE[1])
    prepared = native_layer(weights, bits)
    inputs, found = rounded_inputs(weights, x, 32, bits), prepared(x, row_ranks(RANKS))
    for row, rank in enumerate(RANKS):
        expected = expected_product(weights, inputs[row : row + 1], 32, rank)
        error = (found[row].double() - expected.value[0]).abs()
        rounding = 12 * torch.finfo(torch.float32).eps * expected.magnitude[0] + 1.01 * expected.rounding[0]
        assert (error <= rounding + 1e-30).all()
        assert torch.equal(prepared(x[row : row + 1], row_ranks([rank]))[0], found[row])
    assert torch.equal(found[RANKS.index(RANK)], prepared(x)[RANKS.index(RANK)])


def truncated_network(model: TinyModel, rank: int) -> TinyModel:
    return replace(model, linears={path: truncated(weights, rank) for path, weights in model.linears.items()})


@torch.inference_mode()
def logits_with(network: Network, tokens: list[int], rank: int | None) -> Tensor:
    """(num_tokens, vocab_size) of one sequence without a cache."""
    batch = Batch(
        torch.tensor(tokens), torch.arange(len(tokens)), (SequenceSpan(0, len(tokens), len(tokens), rank=rank),)
    )
    return network.logits(network(batch))


KINDS = {
    "two factors": LinearKind(rank=RANK),
    "two blocks": LinearKind(rank=64, factor_dtype="float32"),
    "single factor": LinearKind(rank=RANK, form="single-factor", has_channel_order=True),
}


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Saved]:
    model = network_of(KINDS[request.param])
    return model, save(tmp_path_factory.mktemp("rank") / "a", model)


@pytest.mark.parametrize("rank", [0, 5, 32])
def test_the_reference_network_is_that_of_truncated_factors(
    rank: int, artifact: tuple[TinyModel, Saved], tmp_path: Path
) -> None:
    model, saved = artifact
    expected = logits_of(save(tmp_path / "t", truncated_network(model, rank)).reference(), TOKENS[:30])
    whole = logits_of(saved.reference(), TOKENS[:30])
    found = logits_with(saved.reference(), TOKENS[:30], rank)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((found - whole).norm()) > 0.01 * float(whole.norm())


@needs_native
@pytest.mark.parametrize("rank", [0, 32])
def test_the_native_network_is_that_of_truncated_factors_bit_for_bit(
    rank: int, artifact: tuple[TinyModel, Saved], tmp_path: Path
) -> None:
    # whole blocks: within one, the scale of lora_up's codes stays that of all 32 components
    model, saved = artifact
    expected = logits_of(save(tmp_path / "t", truncated_network(model, rank)).native())
    assert torch.equal(logits_with(saved.native(), TOKENS, rank), expected)
    assert not torch.equal(logits_of(saved.native()), expected)


@needs_native
@pytest.mark.parametrize("rank", [0, 5, 33])
def test_the_native_network_is_close_to_the_reference_at_every_rank(
    rank: int, artifact: tuple[TinyModel, Saved]
) -> None:
    _, saved = artifact
    expected = logits_with(saved.reference(), TOKENS, rank)
    found = logits_with(saved.native(activations="16"), TOKENS, rank)
    assert float(torch.cosine_similarity(found, expected, dim=-1).min()) > 0.9998
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


@needs_native
def test_sequences_of_several_ranks_in_one_step_are_as_alone_bit_for_bit(artifact: tuple[TinyModel, Saved]) -> None:
    network = artifact[1].native()
    ranks = [None, 0, 5, 32, 33, None]
    alone = [logits_with(network, TOKENS[:40], rank) for rank in ranks]
    assert torch.equal(logits_with(network, TOKENS[:40], RANK + 100), alone[0])
    cache, done = network.new_cache(3 * len(ranks)), 0
    for size in (7, 16, 1, 16):  # chunks of prompts, and a decode
        spans = [
            SequenceSpan(index * size, size, done + size, None, [3 * index, 3 * index + 1, 3 * index + 2], rank)
            for index, rank in enumerate(ranks)
        ]
        tokens = TOKENS[done : done + size] * len(ranks)
        done += size
        last = [span.start + size - 1 for span in spans]
        logits = network.step(TokenBatch(tokens, spans, last), cache)
        assert logits is not None
        for row, expected in zip(logits, alone, strict=True):
            assert torch.equal(row, expected[done - 1])


def test_sequences_of_several_ranks_share_a_step_of_the_reference(artifact: tuple[TinyModel, Saved]) -> None:
    network = artifact[1].reference()
    ranks = [None, 0, 5]
    spans = tuple(SequenceSpan(20 * index, 20, 20, rank=rank) for index, rank in enumerate(ranks))
    batch = Batch(torch.tensor(TOKENS[:20] * 3), torch.arange(20).repeat(3), spans)
    with torch.inference_mode():
        together = network.logits(network(batch)).view(3, 20, -1)
    for found, rank in zip(together, ranks, strict=True):
        expected = logits_with(network, TOKENS[:20], rank)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_nobody_asks_and_no_row_has_a_rank() -> None:
    assert Batch.uncached([[1, 2], [3]]).row_ranks is None
    assert ranks_of_rows([SequenceSpan(0, 2, 2)]) is None


def test_rows_have_the_rank_of_their_span() -> None:
    spans = (SequenceSpan(0, 2, 2, rank=3), SequenceSpan(2, 1, 1), SequenceSpan(3, 1, 1, rank=1 << 40))
    batch = Batch(torch.arange(4), torch.arange(4), spans)
    assert batch.row_ranks is not None
    assert batch.row_ranks.per_row.tolist() == [3, 3, ALL_COMPONENTS, ALL_COMPONENTS]
    assert batch.row_ranks.largest == ALL_COMPONENTS


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 components"):
        ranks_of_rows([SequenceSpan(0, 2, 2, rank=-1)])
