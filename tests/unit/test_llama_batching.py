"""Ragged batches, chunked prefill and mixed steps give what each sequence gives alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.llama import attention
from models.llama.attention import AttentionPlan
from models.llama.batch import Batch, SequenceSpan
from models.llama.config import LlamaConfig
from models.llama.kv_cache import PagedKVCache
from models.llama.model import DecoderLayer, LlamaForCausalLM
from models.llama.rope import RotaryEmbedding
from tests.support.llama_variants import StateDictWeights, cached_step, hf_values, scattered_cache, uncached_logits
from tests.support.tiny_checkpoints import random_tensors

TOLERANCE = 2e-5
WINDOWED = ["llama_grouped_tied", "mistral_window", "qwen2_window", "qwen2_layer_types"]


def build(variant: str, **changes: object) -> LlamaForCausalLM:
    values = hf_values(variant, **changes)
    return LlamaForCausalLM(LlamaConfig.from_hf(values, "config.json"), StateDictWeights(random_tensors(values)))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", [*WINDOWED, "llama_dynamic_rope"])
@pytest.mark.parametrize("lengths", [(5, 1, 17), (6, 6, 6), (3, 3, 9, 9, 3)])
def test_a_ragged_batch_equals_its_sequences_one_by_one(variant: str, lengths: tuple[int, ...]) -> None:
    changes = {"max_position_embeddings": 8} if variant == "llama_dynamic_rope" else {}
    model = build(variant, **changes)
    sequences = prompts(*lengths)
    together = model.logits(model(Batch.uncached(sequences))).split(list(lengths))
    for logits, sequence in zip(together, sequences, strict=True):
        assert_same(logits, uncached_logits(model, sequence))


def test_equal_lengths_without_a_cache_take_one_attention_call_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama_grouped_tied")
    shapes = []
    real = attention._sdpa

    def recording(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        shapes.append(tuple(query.shape))
        return real(query, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_sdpa", recording)
    model(Batch.uncached(prompts(7, 7, 7)))
    assert shapes == [(3, 6, 7, 8)] * 3


@pytest.mark.parametrize("variant", WINDOWED)
@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 30])
def test_chunked_prefill_equals_full_prefill(variant: str, chunk: int) -> None:
    model = build(variant)
    (tokens,) = prompts(30)
    cache, sequences = scattered_cache(model, 1, 30)
    pieces = [cached_step(model, cache, sequences, [tokens[start : start + chunk]])[0] for start in range(0, 30, chunk)]
    assert_same(torch.cat(pieces), uncached_logits(model, tokens))


@pytest.mark.parametrize("variant", ["llama_grouped_tied", "mistral_window"])
def test_masked_attention_is_the_same_in_small_query_chunks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(variant)
    (tokens,) = prompts(29)
    expected = uncached_logits(model, tokens)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 3)
    assert_same(uncached_logits(model, tokens), expected)
    cache, sequences = scattered_cache(model, 1, 29)
    first = cached_step(model, cache, sequences, [tokens[:10]])[0]
    rest = cached_step(model, cache, sequences, [tokens[10:]])[0]
    assert_same(torch.cat((first, rest)), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), variant=st.sampled_from(WINDOWED))
def test_any_schedule_of_prefill_chunks_and_decode_steps_equals_the_whole_sequences(
    data: st.DataObject, variant: str
) -> None:
    model = build(variant)
    texts = prompts(*data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4)))
    cache, sequences = scattered_cache(model, len(texts), 14)
    seen: list[list[Tensor]] = [[] for _ in texts]
    while unfinished := [i for i, text in enumerate(texts) if sequences[i].num_done < len(text)]:
        step = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, max_size=4, unique=True))
        counts = [data.draw(st.integers(1, len(texts[i]) - sequences[i].num_done)) for i in step]
        new = [texts[i][sequences[i].num_done :][:count] for i, count in zip(step, counts, strict=True)]
        for i, logits in zip(step, cached_step(model, cache, [sequences[i] for i in step], new), strict=True):
            seen[i].append(logits)
    for text, pieces in zip(texts, seen, strict=True):
        assert_same(torch.cat(pieces), uncached_logits(model, text))


def test_decode_steps_of_similar_length_share_one_call_and_padding_never_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama_grouped_tied")
    texts = prompts(9, 12, 15)
    cache, sequences = scattered_cache(model, 3, 16)
    cached_step(model, cache, sequences, [text[:-1] for text in texts])
    num_calls = 0
    real = attention._sdpa

    def counting(*args: object, **kwargs: object) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_sdpa", counting)
    last = cached_step(model, cache, sequences, [text[-1:] for text in texts])
    assert num_calls == model.config.num_hidden_layers
    for logits, text in zip(last, texts, strict=True):
        assert_same(logits[0], uncached_logits(model, text)[-1])


def test_one_layer_run_alone_equals_the_same_layer_inside_the_network() -> None:
    values = hf_values("mistral_window", num_hidden_layers=1)
    weights = StateDictWeights(random_tensors(values))
    config = LlamaConfig.from_hf(values, "config.json")
    model = LlamaForCausalLM(config, weights)
    batch = Batch.uncached(prompts(20, 9))
    layer = DecoderLayer(config, 0, weights)
    hidden = weights.tensors["model.embed_tokens.weight"][batch.token_ids]
    alone = model.norm(layer(hidden, batch, RotaryEmbedding(config)(batch, torch.float32)))
    torch.testing.assert_close(alone, model(batch), rtol=0, atol=0)


def test_a_half_precision_cache_changes_little() -> None:
    model = build("llama_grouped_tied")
    (tokens,) = prompts(12)
    cache = PagedKVCache(model.config, num_blocks=1, block_size=12, dtype=torch.float16)
    slots = torch.arange(12)
    for position, token in enumerate(tokens):
        span = SequenceSpan(0, 1, position + 1, slots[: position + 1])
        logits = model.logits(model(Batch(torch.tensor([token]), torch.tensor([position]), (span,)), cache))
    torch.testing.assert_close(logits[0], uncached_logits(model, tokens)[-1], rtol=0, atol=0.02)


@given(st.data())
@settings(deadline=None)
def test_an_8_bit_cache_is_off_by_half_a_step_of_each_token_and_head_at_most(data: st.DataObject) -> None:
    config = LlamaConfig.from_hf(hf_values("llama_grouped_tied"), "config.json")
    cache = PagedKVCache(config, num_blocks=2, block_size=4, dtype=torch.int8)
    heads, channels = config.num_key_value_heads, config.head_dim
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    key, value = torch.randn(2, 5, heads, channels, generator=generator)
    key *= 10.0 ** data.draw(st.integers(-20, 20))
    value[data.draw(st.integers(0, 4))] = 0.0
    slots = torch.tensor([7, 0, 6, 3, 4])
    read_back = cache.write(1, key, value, slots)
    for written, read, told in zip((key, value), cache.read(1, slots), read_back, strict=True):
        assert torch.equal(read, told)
        step = written.abs().amax(-1, keepdim=True).double() / 127
        assert read.dtype == torch.float32
        assert ((read.double() - written.double()).abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_an_8_bit_cache(value: float) -> None:
    config = LlamaConfig.from_hf(hf_values("llama_grouped_tied"), "config.json")
    cache = PagedKVCache(config, num_blocks=1, dtype=torch.int8)
    rows = torch.ones(1, config.num_key_value_heads, config.head_dim)
    rows[0, 0, 0] = value
    cache.write(0, rows, rows, torch.tensor([0]))
    key, _ = cache.read(0, torch.tensor([0]))
    assert not key[0, 0].isfinite().all()
    assert torch.equal(key[0, 1:], rows[0, 1:])


def test_attention_over_an_8_bit_cache_is_off_by_what_its_steps_allow() -> None:
    """Scores move by no more than |q| times half a step, and so weights by that factor; values by half a step."""
    model = build("llama_grouped_tied")
    (tokens,) = prompts(24)
    exact, coarse = (
        PagedKVCache(model.config, num_blocks=2, block_size=12, dtype=dtype) for dtype in (torch.float32, torch.int8)
    )
    heads, channels = model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, len(tokens), heads, channels, generator=generator)
    query = torch.randn(1, model.config.num_attention_heads, channels, generator=generator)
    slots = torch.arange(len(tokens))
    for cache in (exact, coarse):
        cache.write(0, key[:-1], value[:-1], slots[:-1])
    batch = Batch(torch.tensor([1]), slots[-1:], (SequenceSpan(0, 1, len(tokens), slots),))
    plan = AttentionPlan.of(batch, None, has_cache=True)
    want, got = (plan.attend(0, query, key[-1:], value[-1:], cache).double() for cache in (exact, coarse))
    key_error, value_error = (float(rows.abs().max()) / 254 for rows in (key, value))
    score_error = float(query.abs().sum(-1).max()) * key_error / channels**0.5
    weight_error = math.exp(2 * score_error) - 1  # of each weight, relative to itself
    bound = value_error + weight_error * float(value.abs().max())
    assert 0 < float((got - want).abs().max()) <= bound


def test_a_plan_refuses_spans_that_do_not_go_with_the_cache() -> None:
    with pytest.raises(ValueError, match="needs slots"):
        AttentionPlan.of(Batch.uncached([[1, 2]]), None, has_cache=True)
    span = SequenceSpan(0, 1, 3, torch.arange(3))
    with pytest.raises(ValueError, match="key-value cache"):
        AttentionPlan.of(Batch(torch.tensor([1]), torch.tensor([2]), (span,)), None, has_cache=False)


def test_an_8_bit_cache_takes_a_byte_per_number_and_a_scale_per_token_and_head() -> None:
    config = LlamaConfig.from_hf(hf_values("llama_odd_heads"), "config.json")
    cache = PagedKVCache(config, num_blocks=7, block_size=16, dtype=torch.int8)
    assert cache.nbytes == 7 * PagedKVCache.bytes_per_block(config, 16, torch.int8)
    assert cache.nbytes == 2 * 3 * 3 * (4 + 4) * 7 * 16  # k and v, layers, kv heads, head_dim and scale, slots
    assert cache.dtype == torch.int8


def test_cache_size_is_blocks_times_bytes_per_block() -> None:
    config = LlamaConfig.from_hf(hf_values("llama_odd_heads"), "config.json")
    for dtype in (torch.float32, torch.bfloat16):
        cache = PagedKVCache(config, num_blocks=7, block_size=16, dtype=dtype)
        assert cache.nbytes == 7 * PagedKVCache.bytes_per_block(config, 16, dtype)
        assert cache.nbytes == 2 * 3 * 3 * 4 * 7 * 16 * dtype.itemsize  # k and v, layers, kv heads, head_dim, slots
        assert cache.num_slots == 112


def test_cache_returns_what_was_written_slot_by_slot() -> None:
    config = LlamaConfig.from_hf(hf_values("llama_grouped_tied"), "config.json")
    cache = PagedKVCache(config, num_blocks=3, block_size=4)
    key, value = torch.randn(2, 5, 2, 8)
    slots = torch.tensor([7, 0, 11, 3, 4])
    cache.write(0, value, key, slots)
    cache.write(1, key, value, slots)
    read_key, read_value = cache.read(1, slots.flip(0))
    torch.testing.assert_close(read_key, key.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(read_value, value.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(cache.read(0, slots)[0], value, rtol=0, atol=0)
