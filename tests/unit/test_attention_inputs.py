"""Quantized queries, keys and values against attention written by hand: loops over heads and tokens in float64."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import SchemeError
from models.llama.batch import Batch, SequenceSpan
from models.llama.config import LlamaConfig
from models.llama.kv_cache import PagedKVCache
from models.llama.model import LlamaForCausalLM
from models.quant.activation import quantize_activations
from models.scheme import ActivationScheme
from tests.support.linear_oracle import quantized_row
from tests.support.llama_variants import StateDictWeights, cached_step, hf_values, scattered_cache, uncached_logits
from tests.support.tiny_checkpoints import random_tensors

TOKENS = [5, 17, 100, 42, 42, 8, 77, 3, 99]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
SCHEMES = [
    ActivationScheme(4),
    ActivationScheme(4, 32),
    ActivationScheme(3, 64, is_symmetric=True),
    ActivationScheme(4, 32, clip_ratio=0.8),
    ActivationScheme(4, 16, format="mxint"),
]
CACHED = ["llama_grouped_tied", "mistral_window", "qwen2_layer_types"]


def network(variant: str, scheme: ActivationScheme | None, **changes: Any) -> LlamaForCausalLM:
    """In float64, where a token's values do not depend on which other tokens are in the batch."""
    values = hf_values(variant, **{**HEADS, **changes})
    tensors = {name: tensor.double() for name, tensor in random_tensors(values).items()}
    config = LlamaConfig.from_hf(values, "config.json").with_attention(scheme)
    return LlamaForCausalLM(config, StateDictWeights(tensors))


class ByHand:
    """The network of ``config`` over ``tensors``, one head and one token at a time."""

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def logits(self, tokens: list[int]) -> Tensor:
        hidden = self.tensors["model.embed_tokens.weight"][tokens]
        for index in range(self.config.num_hidden_layers):
            path = f"model.layers.{index}"
            hidden = hidden + self.attention(index, self.norm(hidden, f"{path}.input_layernorm"))
            normed = self.norm(hidden, f"{path}.post_attention_layernorm")
            gate = self.linear(normed, f"{path}.mlp.gate_proj")
            up = self.linear(normed, f"{path}.mlp.up_proj")
            hidden = hidden + self.linear(gate / (1 + (-gate).exp()) * up, f"{path}.mlp.down_proj")
        return self.norm(hidden, "model.norm") @ self.tensors[self.config.head_name].T

    def attention(self, index: int, x: Tensor) -> Tensor:
        path, head_dim = f"model.layers.{index}.self_attn", self.config.head_dim
        query = self.quantized(self.rotated(self.linear(x, f"{path}.q_proj")))
        key = self.keys[index] = self.quantized(self.rotated(self.linear(x, f"{path}.k_proj")))
        value = self.values[index] = self.quantized(self.linear(x, f"{path}.v_proj"))
        shared_by = self.config.num_attention_heads // self.config.num_key_value_heads
        window = self.config.window(index) or len(x)
        output = torch.zeros_like(query)
        for head in range(self.config.num_attention_heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared = slice(head // shared_by * head_dim, (head // shared_by + 1) * head_dim)
            for token in range(len(x)):
                seen = range(max(0, token - window + 1), token + 1)
                scores = [float(query[token, own] @ key[other, shared]) / head_dim**0.5 for other in seen]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for other, score in zip(seen, scores, strict=True):
                    output[token, own] += math.exp(score - max(scores)) / total * value[other, shared]
        return self.linear(output, f"{path}.o_proj")

    def quantized(self, x: Tensor) -> Tensor:
        scheme = self.config.attention
        return x if scheme is None else torch.tensor([quantized_row(row, scheme) for row in x.tolist()]).double()

    def rotated(self, x: Tensor) -> Tensor:
        half, rotated = self.config.head_dim // 2, x.clone()
        for token in range(len(x)):
            for first in range(x.shape[1]):
                pair = first % self.config.head_dim
                if pair < half:
                    angle = token * self.config.rope.theta ** (-pair / half)
                    a, b = float(x[token, first]), float(x[token, first + half])
                    rotated[token, first] = a * math.cos(angle) - b * math.sin(angle)
                    rotated[token, first + half] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    def linear(self, x: Tensor, path: str) -> Tensor:
        return x @ self.tensors[f"{path}.weight"].T + self.tensors.get(f"{path}.bias", torch.tensor(0.0))

    def norm(self, x: Tensor, path: str) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x / rms * self.tensors[f"{path}.weight"]


def by_hand(variant: str, scheme: ActivationScheme | None) -> ByHand:
    values = hf_values(variant, **HEADS)
    config = LlamaConfig.from_hf(values, "config.json").with_attention(scheme)
    return ByHand(config, random_tensors(values))


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
@pytest.mark.parametrize("variant", ["llama_biases", "mistral_window", "qwen2_window"])
def test_the_network_is_that_of_attention_written_by_hand(variant: str, scheme: ActivationScheme | None) -> None:
    found = uncached_logits(network(variant, scheme), TOKENS)
    torch.testing.assert_close(found.double(), by_hand(variant, scheme).logits(TOKENS), rtol=0, atol=2e-5)


def test_a_coarser_grid_moves_the_outputs_further() -> None:
    plain = uncached_logits(network("llama_grouped_tied", None), TOKENS)

    def distance(scheme: ActivationScheme) -> float:
        return float((uncached_logits(network("llama_grouped_tied", scheme), TOKENS) - plain).norm() / plain.norm())

    assert 0 < distance(ActivationScheme(8)) < 0.03
    assert distance(ActivationScheme(8)) < distance(ActivationScheme(4)) / 4
    assert distance(ActivationScheme(4)) < distance(ActivationScheme(2))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_cache_holds_quantized_keys_and_values(scheme: ActivationScheme) -> None:
    model, expected = network("llama_grouped_tied", scheme), by_hand("llama_grouped_tied", scheme)
    expected.logits(TOKENS)
    cache = PagedKVCache(model.config, num_blocks=1, dtype=torch.float64)
    slots = torch.arange(len(TOKENS))
    span = SequenceSpan(0, len(TOKENS), len(TOKENS), slots)
    model(Batch(torch.tensor(TOKENS), slots, (span,)), cache)
    for index in range(model.config.num_hidden_layers):
        key, value = cache.read(index, slots)
        torch.testing.assert_close(key.flatten(1), expected.keys[index], rtol=0, atol=2e-6)
        torch.testing.assert_close(value.flatten(1), expected.values[index], rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("variant", CACHED)
def test_cached_decoding_equals_the_forward_pass_without_a_cache(variant: str, scheme: ActivationScheme) -> None:
    model = network(variant, scheme, num_hidden_layers=3)
    texts = [TOKENS, TOKENS[::-1][:6]]
    cache, sequences = scattered_cache(model, len(texts), len(TOKENS))
    seen = [[logits] for logits in cached_step(model, cache, sequences, [text[:3] for text in texts])]
    seen[0] += cached_step(model, cache, sequences[:1], [texts[0][3:6]])
    for step in range(3):
        new = [texts[0][6 + step : 7 + step], texts[1][3 + step : 4 + step]]
        for pieces, logits in zip(seen, cached_step(model, cache, sequences, new), strict=True):
            pieces.append(logits)
    for text, pieces in zip(texts, seen, strict=True):
        torch.testing.assert_close(torch.cat(pieces), uncached_logits(model, text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_inputs_keep_the_type_of_the_activations(dtype: torch.dtype) -> None:
    values = hf_values("llama_grouped_tied", **HEADS)
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(values).items()}
    scheme = ActivationScheme(4, 32)
    config = LlamaConfig.from_hf(values, "config.json").with_attention(scheme)
    model = LlamaForCausalLM(config, StateDictWeights(tensors))
    cache = PagedKVCache(config, num_blocks=1, dtype=dtype)
    slots = torch.arange(len(TOKENS))
    batch = Batch(torch.tensor(TOKENS), slots, (SequenceSpan(0, len(TOKENS), len(TOKENS), slots),))
    assert model(batch, cache).dtype is dtype
    normed = model.get_submodule("layers.0.input_layernorm")(model.embed_tokens[TOKENS])
    value = model.get_submodule("layers.0.self_attn.v_proj")(normed)
    found = cache.read(0, slots)[1].flatten(1)
    assert torch.equal(found, quantize_activations(value, scheme))


def test_groups_that_do_not_tile_the_heads_are_refused_with_what_fits() -> None:
    config = LlamaConfig.from_hf(hf_values("llama_grouped_tied", **HEADS), "config.json")
    with pytest.raises(
        SchemeError,
        match=r"^attention: group_size 128 does not divide the 64 channels of the keys and values of self_attn "
        r"\(2 x 32\); choose one of \[-1, 32, 64\]$",
    ):
        config.with_attention(ActivationScheme(4, 128))
    assert config.with_attention(ActivationScheme(4, 64)).attention == ActivationScheme(4, 64)
    assert config.with_attention(ActivationScheme(4, 64)).with_attention(None) == config
