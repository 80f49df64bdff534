"""Every architecture variant as a transformers model and as ours, with the same random weights."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.linear import DenseLinear
from models.llama.batch import Batch, SequenceSpan
from models.llama.config import LlamaConfig
from models.llama.kv_cache import PagedKVCache
from models.llama.model import LlamaForCausalLM

_BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama1_multi_head": {"model_type": "llama", "num_key_value_heads": 6, "rms_norm_eps": 1e-5},
    "llama_grouped_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_multi_query": {"model_type": "llama", "num_key_value_heads": 1},
    "llama_odd_heads": {"model_type": "llama", "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama_head_dim": {"model_type": "llama", "head_dim": 16},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_theta": 500.0,
        "scaling": {"rope_type": "llama3"} | _LLAMA3,
    },
    "llama_linear_rope": {"model_type": "llama", "scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_dynamic_rope": {"model_type": "llama", "scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral_window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2_layer_types": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def hf_values(variant: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a variant, in the older spelling."""
    values = {**_BASE, **VARIANTS[variant], **changes}
    values["architectures"] = [ARCHITECTURES[values["model_type"]]]
    scaling = values.pop("scaling", None)
    if scaling is not None:
        values["rope_scaling"] = scaling
    return values


def hf_model(values: dict[str, Any]) -> nn.Module:
    """The transformers model for ``values`` with random weights of a size that matters, biases and gains too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Small embeddings and large layers: a tied head would otherwise repeat its input for ever.
            scale = 0.15 if "embed_tokens" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(1.0 + 0.3 * noise if name.endswith("norm.weight") else noise * scale)
    return model.requires_grad_(False)


class StateDictWeights:
    """A weight source over a state dict; remembers what was asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def tensor(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.tensors[name]

    def linear(self, path: str) -> nn.Module:
        self.asked.append(f"{path}.weight")
        return DenseLinear(self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.bias"))


def our_model(values: dict[str, Any], model: nn.Module) -> LlamaForCausalLM:
    """Our network with the parameters of a transformers model."""
    return LlamaForCausalLM(LlamaConfig.from_hf(values, "config.json"), StateDictWeights(dict(model.state_dict())))


def uncached_logits(model: LlamaForCausalLM, tokens: Sequence[int]) -> Tensor:
    """(num_tokens, vocab_size) of one sequence."""
    return model.logits(model(Batch.uncached([tokens])))


@dataclass
class CachedSequence:
    """One sequence being generated through the cache; its blocks are scattered on purpose."""

    slots: Tensor
    num_done: int = 0

    def span(self, start: int, num_tokens: int) -> SequenceSpan:
        context_len = self.num_done + num_tokens
        return SequenceSpan(start, num_tokens, context_len, self.slots[:context_len])


def scattered_cache(
    model: LlamaForCausalLM, num_sequences: int, length: int
) -> tuple[PagedKVCache, list[CachedSequence]]:
    """A cache filled with NaN, so that reading a slot that was never written shows; and its slots, shuffled."""
    num_blocks = -(-num_sequences * length // 4)
    cache = PagedKVCache(model.config, num_blocks, block_size=4, dtype=model.dtype)
    everything = torch.arange(cache.num_slots)
    hollow = torch.full((cache.num_slots, model.config.num_key_value_heads, model.config.head_dim), float("nan"))
    for layer_index in range(model.config.num_hidden_layers):
        cache.write(layer_index, hollow, hollow, everything)
    order = torch.randperm(cache.num_slots, generator=torch.Generator().manual_seed(2))
    return cache, [CachedSequence(order[index * length : (index + 1) * length]) for index in range(num_sequences)]


def cached_step(
    model: LlamaForCausalLM, cache: PagedKVCache, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Feed each sequence its next ``tokens`` in one batch; logits (num_tokens, vocab_size) of each."""
    spans, positions, start = [], [], 0
    for sequence, new in zip(sequences, tokens, strict=True):
        spans.append(sequence.span(start, len(new)))
        positions.append(torch.arange(sequence.num_done, sequence.num_done + len(new)))
        start += len(new)
    batch = Batch(torch.tensor([token for new in tokens for token in new]), torch.cat(positions), tuple(spans))
    logits = model.logits(model(batch, cache))
    for sequence, new in zip(sequences, tokens, strict=True):
        sequence.num_done += len(new)
    return list(torch.split(logits, [len(new) for new in tokens]))
