"""The fused network against the same network on the reference backend, and against itself in other portions."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import KernelError
from models.evaluate.generate import generate_greedily
from models.llama import native, native_programs
from models.llama.batch import Batch, SequenceSpan, TokenBatch
from models.llama.native import NativeLlama
from models.llama.native_cache import NativeKVCache
from models.scheme import ActivationScheme, QuantScheme, VocabularyScheme
from tests.support.artifact_builder import LinearKind
from tests.support.native import needs_native
from tests.support.native_network import TOKENS, Saved, logits_of, network_of, save, save_quantized

pytestmark = needs_native

INT8 = ActivationScheme(8, 32)
NETWORKS: dict[str, tuple[LinearKind, dict[str, Any]]] = {
    "grouped queries": (LinearKind(), {}),
    "multi-head": (LinearKind(), {"num_key_value_heads": 4}),
    "multi-query": (LinearKind(), {"num_key_value_heads": 1}),
    "wide heads": (LinearKind(), {"head_dim": 32}),
    "tied": (LinearKind(), {"tie_word_embeddings": True}),
    "biases": (LinearKind(), {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (LinearKind(), {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
    "sliding window": (
        LinearKind(),
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 21},
    ),
    "linear rope": (LinearKind(), {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3 rope": (
        LinearKind(),
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "merged": (LinearKind(QuantScheme(4, 32, is_symmetric=True), form="none"), {}),
    "single factor": (LinearKind(rank=32, form="single-factor", has_channel_order=True), {}),
    "transformed inputs": (LinearKind(has_input_scale=True, has_channel_order=True, rotation_block=16), {}),
    "mxint": (LinearKind(QuantScheme(4, 32, format="mxint")), {}),
    "three bits per row": (LinearKind(QuantScheme(3, -1)), {}),
    "8-bit inputs": (LinearKind(activations=INT8), {}),
    "8-bit inputs per token": (LinearKind(form="none", activations=ActivationScheme(8, is_symmetric=True)), {}),
}


def assert_close(found: Tensor, expected: Tensor, cosine: float, largest: float) -> None:
    """Every row points the same way, and no logit is further off than ``largest`` of the largest one."""
    assert float(F.cosine_similarity(found, expected, dim=-1).min()) > cosine
    assert float((found - expected).abs().max()) < largest * float(expected.abs().max())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("network") / "a", network_of())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_the_logits_of_the_reference(name: str, tmp_path: Path) -> None:
    kind, changes = NETWORKS[name]
    artifact = save(tmp_path / "a", network_of(kind, **changes))
    expected = logits_of(artifact.reference())
    # 16-bit inputs leave the 8-bit factors and head, and the float16 cache
    assert_close(logits_of(artifact.native(activations="16")), expected, 0.9998, 0.02)
    assert_close(logits_of(artifact.native(activations="8")), expected, 0.9995, 0.03)


@pytest.mark.parametrize("scheme", [INT8, ActivationScheme(6, 16, format="mxint"), ActivationScheme(8)], ids=str)
def test_queries_keys_and_values_are_rounded_as_the_artifact_says(scheme: ActivationScheme, tmp_path: Path) -> None:
    artifact = save(tmp_path / "a", network_of(LinearKind(form="none")), attention=scheme)
    assert_close(logits_of(artifact.native(activations="16")), logits_of(artifact.reference()), 0.999, 0.05)


def test_eight_bits_are_coarser_than_sixteen(saved: Saved) -> None:
    expected = logits_of(saved.reference())
    eight, sixteen = (logits_of(saved.native(activations=bits)) for bits in ("8", "16"))
    assert float((sixteen - expected).norm()) < 0.7 * float((eight - expected).norm())


def test_queries_keys_and_values_may_treat_their_input_differently(tmp_path: Path) -> None:
    model = network_of(LinearKind(has_input_scale=True))
    generator = torch.Generator().manual_seed(3)
    for path, weights in model.linears.items():
        if path.endswith(("q_proj", "v_proj")):
            scale = torch.rand(weights.quantized.in_features, generator=generator) + 0.5
            model.linears[path] = replace(weights, input_scale=scale)
    artifact = save(tmp_path / "a", model)
    fused = artifact.native(activations="16")
    assert [len(layer.qkv) for layer in fused.weights.layers] == [3, 3]
    assert_close(logits_of(fused), logits_of(artifact.reference()), 0.9998, 0.02)


def run_cached(
    model: NativeLlama, cache: NativeKVCache, tables: Sequence[list[int]], portions: Sequence[int]
) -> Tensor:
    """Logits of ``TOKENS`` for every sequence, fed in ``portions`` side by side: (num_sequences, num_tokens, vocab)."""
    outputs, done = [], 0
    for size in portions:
        spans = [SequenceSpan(i * size, size, done + size, None, table) for i, table in enumerate(tables)]
        tokens = torch.tensor(TOKENS[done : done + size] * len(tables))
        positions = torch.arange(done, done + size).repeat(len(tables))
        outputs.append(model(Batch(tokens, positions, tuple(spans)), cache).view(len(tables), size, -1))
        done += size
    hidden = torch.cat(outputs, 1)
    return model.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


@pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
@pytest.mark.parametrize(
    "portions",
    [[100], [1] * 100, [64, 36], [16, 1, 1, 32, 50], [33, 33, 34]],
    ids=lambda sizes: f"{len(sizes)} portions",
)
def test_the_portions_in_which_a_sequence_comes_change_no_bit(
    portions: list[int], cache_dtype: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved.native(kv_cache_dtype=cache_dtype)
    expected = logits_of(model)
    cache = model.new_cache(24)
    assert cache.dtype == {"fp16": torch.float16, "int8": torch.int8}[cache_dtype]
    for tensor in (cache._keys, cache._values):  # whatever a reader of what was never written would find
        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
    tables = [[5, 3, 20, 1, 17, 11, 0], [2, 4, 6, 8, 10, 12, 14, 16]]
    monkeypatch.setattr(native, "STEP_ROWS", 40)
    for logits in run_cached(model, cache, tables, portions):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "setting", [("QERVE_NUM_THREADS", "1"), ("QERVE_NUM_THREADS", "5"), ("QERVE_CPU_ISA", "portable")]
)
def test_threads_and_instruction_sets_change_no_bit(
    setting: tuple[str, str], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(saved.native())
    monkeypatch.setenv(*setting)
    other = saved.native()
    assert setting[1] in {str(other.runtime.num_threads), other.runtime.isa}
    assert torch.equal(logits_of(other), expected)


def test_a_ragged_batch_is_its_sequences_one_by_one(saved: Saved) -> None:
    model = saved.native()
    sequences = [TOKENS[:5], TOKENS[7:8], TOKENS[20:90], TOKENS[1:34]]
    together = model.logits(model(Batch.uncached(sequences))).split([len(sequence) for sequence in sequences])
    for logits, sequence in zip(together, sequences, strict=True):
        assert torch.equal(logits, logits_of(model, sequence))


def test_an_8_bit_cache_is_close_to_a_16_bit_one_and_smaller(saved: Saved) -> None:
    wide, narrow = saved.native(activations="16"), saved.native(activations="16", kv_cache_dtype="int8")
    assert_close(logits_of(narrow), logits_of(wide), 0.9995, 0.03)
    assert not torch.equal(logits_of(narrow), logits_of(wide))
    # of heads of 16 channels: a byte each, and a scale
    assert narrow.cache_block_bytes / wide.cache_block_bytes == (16 + 4) / 32
    for model in (wide, narrow):
        assert model.new_cache(3).nbytes == 3 * model.cache_block_bytes


def test_greedy_generation_is_that_without_a_cache(saved: Saved) -> None:
    model = saved.native()
    tokens = TOKENS[:9]
    for _ in range(40):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    assert generate_greedily(model, TOKENS[:9], 40, lambda new: False) == tokens[9:]


def decoded(model: NativeLlama, cache: NativeKVCache, tables: Sequence[list[int]], position: int) -> Tensor:
    """Logits (num_sequences, vocab_size) of ``TOKENS[position]``, a step in which all sequences decode."""
    spans = [SequenceSpan(i, 1, position + 1, None, table) for i, table in enumerate(tables)]
    rows = list(range(len(tables)))
    logits = model.step(TokenBatch([TOKENS[position]] * len(tables), spans, rows), cache)
    assert logits is not None
    return logits.clone()


def test_a_step_gives_the_logits_of_a_call_whichever_rows_are_asked_for(saved: Saved) -> None:
    model = saved.native()
    expected, cache = logits_of(model), model.new_cache(24)
    tables = [[5, 3, 20, 1, 17, 11, 0], [2, 4, 6, 8, 10, 12, 14, 16], [7, 9, 13, 15, 18, 19, 21, 22]]
    for position in range(40):  # one sequence, then more than the buffers have rows for
        number = 1 if position < 20 else 3
        for logits in decoded(model, cache, tables[:number], position)[:1]:
            assert torch.equal(logits, expected[position])
    mixed = [SequenceSpan(0, 1, 41, None, tables[0]), SequenceSpan(1, 5, 5, None, tables[1])]
    some = model.step(TokenBatch([TOKENS[40], *TOKENS[:5]], mixed, [0, 3, 5]), cache)
    assert some is not None
    assert torch.equal(some, expected[[40, 2, 4]])
    inside_prompt = [SequenceSpan(0, 3, 8, None, tables[1])]
    assert model.step(TokenBatch(TOKENS[5:8], inside_prompt, []), cache) is None
    assert torch.equal(decoded(model, cache, tables[1:2], 8)[0], expected[8])


def test_positions_beyond_the_first_tables_are_made_when_they_come(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits_of(saved.native())
    monkeypatch.setattr(native_programs, "_FIRST_POSITIONS", 8)
    model = saved.native()
    cache = model.new_cache(8)
    assert torch.equal(run_cached(model, cache, [list(range(8))], [5, 20, 75])[0], expected)


def test_very_long_batches_leave_no_buffers_behind(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of(saved.native())
    monkeypatch.setattr(native_programs, "_KEPT_ROWS", 16)
    model = saved.native()
    assert torch.equal(logits_of(model), expected)
    assert len(model._programs._buffers.hidden) <= 16


def test_a_cache_that_is_let_go_takes_its_operators_along(saved: Saved) -> None:
    model = saved.native()
    cache = model.new_cache(8)
    run_cached(model, cache, [list(range(8))], [10])
    keys = weakref.ref(cache._keys)
    del cache
    gc.collect()
    assert keys() is None


def test_no_tokens_give_no_rows(saved: Saved) -> None:
    model = saved.native()
    empty = torch.empty(0, dtype=torch.int64)
    hidden = model(Batch(empty, empty, ()))
    assert hidden.shape == (0, 64)
    assert model.logits(hidden).shape[0] == 0


def test_a_value_that_is_not_finite_spoils_its_own_sequence_only(tmp_path: Path) -> None:
    model = network_of()
    artifact = save(tmp_path / "a", model)
    fused = artifact.native()
    expected = logits_of(fused, TOKENS[:20])
    poison = next(token for token in range(len(fused.weights.table.rows)) if token not in TOKENS[:20])
    fused.weights.table.rows[poison, 3] = float("nan")
    hidden = fused(Batch.uncached([[poison, *TOKENS[:9]], TOKENS[:20]]))
    logits = fused.logits(hidden)
    assert not logits[:10].isfinite().any()
    assert torch.equal(logits[10:], expected)


def test_a_token_that_the_vocabulary_lacks_is_refused(saved: Saved) -> None:
    model = saved.native()
    with pytest.raises(KernelError, match="token id 100000 in row 1"):
        model(Batch.uncached([[1, 100_000]]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "needs a block table"),
        ([0], "1 cache blocks do not hold 20"),
        ([0, 9], "leads out"),
        ([0, -1], "leads out"),
    ],
)
def test_a_wrong_block_table_is_refused(table: list[int] | None, message: str, saved: Saved) -> None:
    model = saved.native()
    batch = Batch(torch.tensor(TOKENS[:20]), torch.arange(20), (SequenceSpan(0, 20, 20, None, table),))
    with pytest.raises(ValueError, match=message):
        model(batch, model.new_cache(4))


def test_earlier_context_needs_its_cache(saved: Saved) -> None:
    batch = Batch(torch.tensor([1]), torch.tensor([5]), (SequenceSpan(0, 1, 6),))
    with pytest.raises(ValueError, match="needs the key-value cache"):
        saved.native()(batch)


def test_resident_bytes_are_told_by_component(saved: Saved) -> None:
    loaded = saved.loaded()
    assert isinstance(loaded.model, NativeLlama)
    parts = loaded.resident_bytes
    assert parts.keys() == {"linear layers", "head", "embedding", "norms"}
    weights = loaded.model.weights
    assert parts["embedding"] == weights.table.rows.numel() * 2
    assert parts["norms"] == 5 * 64 * 4
    assert parts["head"] >= weights.table.rows.numel()


@pytest.mark.parametrize("vocabulary", [VocabularyScheme(4, 8), VocabularyScheme(8, 8), VocabularyScheme(8)], ids=str)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_quantized_head_and_embedding_run_as_they_are_stored(
    vocabulary: VocabularyScheme, is_tied: bool, tmp_path: Path
) -> None:
    artifact = save_quantized(tmp_path / "a", network_of(tie_word_embeddings=is_tied), vocabulary)
    fused = artifact.native(activations="16")
    expected = torch.int8 if vocabulary.embedding_bits == 8 else torch.bfloat16
    assert fused.weights.table.rows.dtype == expected
    assert_close(logits_of(fused), logits_of(artifact.reference()), 0.9999, 0.02)
