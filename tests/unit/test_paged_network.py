"""The network over a paged cache, kernel by kernel: the same logits as the layers give without any cache."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels.paged import MAX_FEW_ROWS, TorchPagedAttention
from models.kernels.triton.environment import TritonEnvironment
from models.llama.attention_choice import AttentionChoice, choose_attention
from models.llama.batch import Batch, SequenceSpan, TokenBatch
from models.llama.config import LlamaConfig
from models.llama.model import LlamaForCausalLM
from models.llama.paged_network import PagedLlama
from models.llama.prefill import FlashAttnPrefill, PrefillAttention, SdpaPrefill
from tests.support.llama_variants import StateDictWeights, hf_values, uncached_logits
from tests.support.paged_steps import fill_with_nan, next_tokens, scattered
from tests.support.tiny_checkpoints import random_tensors

TOLERANCE = 2e-5
NUM_BLOCKS = 24
VARIANTS = ["llama_grouped_tied", "mistral_window", "qwen2_layer_types", "llama_odd_heads", "llama_dynamic_rope"]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What the package of this name documents: aligned at the end, ``window_size`` to the left and right of that."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    queries, keys, values = (
        rows.split(starts.diff().tolist()) for rows, starts in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    outputs = []
    for query, key, value in zip(queries, keys, values, strict=True):
        group = query.shape[1] // key.shape[1]
        each = [rows.repeat_interleave(group, 1).transpose(0, 1) for rows in (key, value)]
        place = torch.arange(len(query))[:, None] + len(key) - len(query)
        distance = place - torch.arange(len(key))
        mask = (distance >= 0) & ((distance <= window_size[0]) | torch.tensor(window_size[0] < 0))
        attended = F.scaled_dot_product_attention(query.transpose(0, 1), *each, attn_mask=mask)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


PREFILLS: dict[str, Callable[[], PrefillAttention]] = {
    "sdpa": SdpaPrefill,
    "flash-attn": lambda: FlashAttnPrefill(flash_attn_varlen_func),
}


def build(variant: str, prefill: str = "sdpa", **changes: object) -> PagedLlama:
    values = hf_values(variant, **changes)
    layers = LlamaForCausalLM(LlamaConfig.from_hf(values, "config.json"), StateDictWeights(random_tensors(values)))
    return PagedLlama(layers, AttentionChoice(TorchPagedAttention(), PREFILLS[prefill]()))


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(VARIANTS), st.sampled_from(sorted(PREFILLS)))
def test_any_schedule_of_prompts_drafts_and_decodes_equals_the_whole_sequences(
    data: st.DataObject, variant: str, prefill: str
) -> None:
    changes = {"max_position_embeddings": 4096} if variant == "llama_dynamic_rope" else {}
    model = build(variant, prefill, **changes)
    sequences = scattered(texts(*data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))), NUM_BLOCKS)
    cache = model.new_cache(NUM_BLOCKS)
    fill_with_nan(cache)
    seen: dict[int, list[Tensor]] = {index: [] for index in range(len(sequences))}
    while unfinished := [index for index, it in enumerate(sequences) if it.num_left]:
        step = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        counts = [
            min(sequences[index].num_left, data.draw(st.sampled_from((1, 1, 4, MAX_FEW_ROWS + 1, 60))))
            for index in step
        ]
        batch = next_tokens([(sequences[index], count) for index, count in zip(step, counts, strict=True)])
        logits = model.step(batch, cache)
        assert logits is not None
        for index, rows in zip(step, logits.split(counts), strict=True):
            seen[index].append(rows)
    for index, sequence in enumerate(sequences):
        whole = uncached_logits(model.layers, sequence.tokens)
        torch.testing.assert_close(torch.cat(seen[index]), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_narrow_caches_change_little(dtype: torch.dtype) -> None:
    model = build("llama_grouped_tied")
    model.layers.cache_dtype = dtype
    (sequence,) = scattered(texts(40), NUM_BLOCKS)
    cache = model.new_cache(NUM_BLOCKS)
    pieces = [model.step(next_tokens([(sequence, count)]), cache) for count in (20, 10, 1, 1, 8)]
    logits = torch.cat([piece for piece in pieces if piece is not None])
    torch.testing.assert_close(logits, uncached_logits(model.layers, sequence.tokens), rtol=0, atol=0.05)


def test_logits_are_of_the_rows_that_were_asked_for_and_none_where_none_were() -> None:
    model = build("llama_grouped_tied")
    first, second = scattered(texts(20, 12), NUM_BLOCKS)
    cache = model.new_cache(NUM_BLOCKS)
    assert model.step(next_tokens([(first, 12)])._replace(logit_rows=[]), cache) is None
    logits = model.step(next_tokens([(first, 8), (second, 12)], all_rows=False), cache)
    assert logits is not None
    wanted = torch.stack([uncached_logits(model.layers, it.tokens)[-1] for it in (first, second)])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE)


def test_without_a_cache_it_is_the_layers_themselves() -> None:
    model = build("mistral_window")
    batch = Batch.uncached(texts(9, 20))
    assert torch.equal(model.logits(model(batch)), model.layers.logits(model.layers(batch)))


@pytest.mark.parametrize("table", [None, [], [3], [0, NUM_BLOCKS], [0, -1]])
def test_a_block_table_that_cannot_be_is_refused(table: list[int] | None) -> None:
    model = build("llama_grouped_tied")
    span = SequenceSpan(0, 1, 20, None, table)
    with pytest.raises(ValueError, match="block"):
        model.step(TokenBatch([1], [span], [0]), model.new_cache(NUM_BLOCKS))


def test_the_scratch_block_is_not_among_those_that_are_handed_out() -> None:
    model = build("llama_grouped_tied")
    cache = model.new_cache(3)
    assert (cache.num_blocks, cache.num_slots) == (3, 48)
    assert cache.nbytes == 4 * model.cache_block_bytes
    assert cache.layer(0).keys.shape[0] == 64


CONFIG = build("llama_grouped_tied").config
CUDA = torch.device("cuda")


def test_the_choice_keeps_why_better_kernels_are_passed_over() -> None:
    choice = choose_attention(CONFIG, CUDA, torch.bfloat16, TritonEnvironment(None, False), lambda _: None)
    assert (choice.decode.name, choice.prefill.name) == ("torch", "sdpa")
    assert "triton is not installed" in choice.passed_over["triton"]
    assert "not installed" in choice.passed_over["flash-attn"]
    assert choice.rows()["not flash-attn attention"] == choice.passed_over["flash-attn"]


def test_what_flash_attn_cannot_take_is_said() -> None:
    nothing = TritonEnvironment(None, False)
    odd = build("llama_odd_heads").config
    for config, dtype, words in (
        (CONFIG, torch.float32, "takes float16 and bfloat16, not float32"),
        (odd, torch.bfloat16, "heads have 4 channels"),
    ):
        choice = choose_attention(config, CUDA, dtype, nothing, lambda name: name)
        assert words in choice.passed_over["flash-attn"]


@pytest.mark.skipif(TritonEnvironment.read().version is None, reason="triton is not installed")
def test_where_triton_runs_it_decodes() -> None:
    choice = choose_attention(CONFIG, torch.device("cpu"), torch.float32, TritonEnvironment("3", True))
    assert choice.decode.name == "triton"
    assert choice.passed_over.keys() == {"flash-attn"}
