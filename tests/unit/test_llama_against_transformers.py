"""Our network against transformers on random tiny models of every supported variant."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.llama.model import LlamaForCausalLM
from tests.support.llama_variants import (
    VARIANTS,
    cached_step,
    hf_model,
    hf_values,
    our_model,
    scattered_cache,
    uncached_logits,
)
from tests.support.tiny_checkpoints import tokenizer_files

TOLERANCE = 1e-4
NUM_GREEDY = 64


def hf_logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def random_prompt(length: int, vocab_size: int = 101) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 4, 40])
def test_logits_agree_for_every_variant(variant: str, length: int) -> None:
    values = hf_values(variant)
    theirs = hf_model(values)
    expected = hf_logits(theirs, random_prompt(length))
    assert expected.std() > 0.5, "logits too flat for the tolerance to mean anything"
    torch.testing.assert_close(
        uncached_logits(our_model(values, theirs), random_prompt(length)), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("length", [128, 129, 200])
def test_dynamic_rope_agrees_at_and_beyond_the_original_maximum(length: int) -> None:
    values = hf_values("llama_dynamic_rope", max_position_embeddings=128)
    theirs = hf_model(values)
    expected = hf_logits(theirs, random_prompt(length))
    ours = our_model(values, theirs)
    torch.testing.assert_close(uncached_logits(ours, random_prompt(length)), expected, rtol=0, atol=TOLERANCE)
    unscaled = our_model(hf_values("llama_dynamic_rope", max_position_embeddings=256), theirs)
    is_scaled = not torch.allclose(uncached_logits(unscaled, random_prompt(length)), expected, atol=1e-2)
    assert is_scaled == (length > 128)


@pytest.mark.parametrize("window", [1, 3, 12, 39, 40, 64])
def test_sliding_windows_shorter_and_longer_than_the_sequence_agree(window: int) -> None:
    values = hf_values("mistral_window", sliding_window=window)
    theirs = hf_model(values)
    expected = hf_logits(theirs, random_prompt(40))
    torch.testing.assert_close(
        uncached_logits(our_model(values, theirs), random_prompt(40)), expected, rtol=0, atol=TOLERANCE
    )


def greedy_uncached(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_GREEDY):
        tokens.append(int(uncached_logits(model, tokens)[-1].argmax()))
    return tokens


def greedy_cached(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    cache, sequences = scattered_cache(model, 1, len(prompt) + NUM_GREEDY)
    tokens, new = list(prompt), list(prompt)
    for _ in range(NUM_GREEDY):
        (logits,) = cached_step(model, cache, sequences, [new])
        new = [int(logits[-1].argmax())]
        tokens += new
    return tokens


def greedy_transformers(model: nn.Module, prompt: list[int], use_cache: bool) -> list[int]:
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens: list[int] = generated[0].tolist()
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_the_same_with_and_without_cache_and_in_transformers(variant: str) -> None:
    values = hf_values(variant)
    theirs = hf_model(values)
    ours = our_model(values, theirs)
    prompt = random_prompt(9)
    expected = greedy_transformers(theirs, prompt, use_cache=True)
    assert len(set(expected[9:])) > 3, "a constant text would prove little"
    assert greedy_cached(ours, prompt) == expected
    assert greedy_uncached(ours, prompt) == expected


def test_greedy_text_with_dynamic_rope_follows_transformers_across_the_original_maximum() -> None:
    values = hf_values("llama_dynamic_rope", max_position_embeddings=32)
    theirs = hf_model(values)
    ours = our_model(values, theirs)
    prompt = random_prompt(9)
    assert greedy_cached(ours, prompt) == greedy_transformers(theirs, prompt, use_cache=True)
    assert greedy_uncached(ours, prompt) == greedy_transformers(theirs, prompt, use_cache=False)


@pytest.mark.parametrize(
    "variant", ["llama3_rope", "llama_linear_rope", "llama_biases", "mistral_window", "qwen2_window"]
)
def test_a_directory_that_transformers_saved_opens_and_agrees(variant: str, tmp_path: Path) -> None:
    theirs = hf_model(hf_values(variant))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    for name, content in tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    checkpoint = open_checkpoint(str(tmp_path))
    assert "rope_parameters" in checkpoint.hf_config, "this version spells the settings the newer way"
    ours = LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint))
    torch.testing.assert_close(
        uncached_logits(ours, random_prompt(30)), hf_logits(theirs, random_prompt(30)), rtol=0, atol=TOLERANCE
    )
    old_spelling = hf_values(variant)
    (tmp_path / "config.json").write_text(json.dumps(old_spelling))
    assert open_checkpoint(str(tmp_path)).config.rope == checkpoint.config.rope


def test_bfloat16_activations_stay_close_to_transformers_in_bfloat16() -> None:
    values = hf_values("llama_grouped_tied")
    reference = hf_logits(hf_model(values), random_prompt(40))
    theirs = hf_model(values).to(torch.bfloat16)
    ours = our_model(values, theirs)
    assert ours.dtype is torch.bfloat16
    our_error = (uncached_logits(ours, random_prompt(40)) - reference).abs().mean()
    their_error = (hf_logits(theirs, random_prompt(40)).float() - reference).abs().mean()
    assert our_error < 1.5 * their_error
