"""Parts of the network: the head that is upcast in pieces, the norm, the order in which weights are asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.llama import model as model_module
from models.llama.batch import Batch, SequenceSpan
from models.llama.config import LlamaConfig
from models.llama.kv_cache import PagedKVCache
from models.llama.model import LlamaForCausalLM, RMSNorm, embed, head_logits
from tests.support.llama_variants import StateDictWeights, hf_values
from tests.support.tiny_checkpoints import random_tensors


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation made."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.num_elements = max(self.num_elements, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_head_logits_equal_a_float64_product(
    head_dtype: torch.dtype, hidden_dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "HEAD_CHUNK_ELEMENTS", 16 * 10)
    hidden, head = torch.randn(num_rows, 16).to(hidden_dtype), torch.randn(33, 16).to(head_dtype)
    logits = head_logits(hidden, head)
    expected = torch.tensor(
        [[sum(a * b for a, b in zip(row, column, strict=True)) for column in head.tolist()] for row in hidden.tolist()],
        dtype=torch.float64,
    )
    # A product taken in bfloat16 is rounded once at the end, to 8 bits.
    rtol, atol = (2**-8, 2**-8) if hidden_dtype == head_dtype == torch.bfloat16 else (0.0, 1e-5)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=rtol, atol=atol)


def test_a_narrow_head_is_never_upcast_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "HEAD_CHUNK_ELEMENTS", 64 * 16)
    hidden, head = torch.randn(2, 64), torch.randn(500, 64).bfloat16()
    with LargestFloat32() as largest:
        head_logits(hidden, head)
    assert 0 < largest.num_elements <= 64 * 16


def test_a_narrow_embedding_is_widened_row_by_row() -> None:
    weight = torch.randn(500, 64).bfloat16()
    with LargestFloat32() as largest:
        rows = embed(torch.tensor([3, 499]), weight, torch.float32)
    assert largest.num_elements == 2 * 64
    torch.testing.assert_close(rows, weight[[3, 499]].float(), rtol=0, atol=0)


def test_float32_activations_over_16_bit_embedding_and_head_match_the_widened_network() -> None:
    values = hf_values("llama_head_dim")
    config = LlamaConfig.from_hf(values, "config.json")
    tensors = random_tensors(values)
    narrow = {name: tensors[name].bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    model = LlamaForCausalLM(config, StateDictWeights(tensors | narrow))
    wide = LlamaForCausalLM(config, StateDictWeights(tensors | {name: t.float() for name, t in narrow.items()}))
    assert model.dtype is torch.float32
    assert model.embed_tokens.dtype is torch.bfloat16
    batch = Batch.uncached([[1, 2, 3]])
    torch.testing.assert_close(model.logits(model(batch)), wide.logits(wide(batch)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_equals_its_definition_in_float64_even_where_squares_overflow(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 64) * 2000).to(dtype)
    weight = torch.randn(64).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    actual = RMSNorm(weight, 1e-5)(x)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("variant", ["llama_grouped_tied", "llama_biases"])
def test_every_parameter_is_asked_for_once_and_layer_by_layer(variant: str) -> None:
    values = hf_values(variant)
    config = LlamaConfig.from_hf(values, "config.json")
    weights = StateDictWeights(random_tensors(values))
    LlamaForCausalLM(config, weights)
    assert sorted(weights.asked) == sorted(name for name in config.tensor_shapes() if not name.endswith(".bias"))
    layers = [name.split(".")[2] for name in weights.asked if ".layers." in name]
    assert layers == sorted(layers)
    assert weights.asked[0] == "model.embed_tokens.weight"


def test_the_head_is_the_embedding_only_when_tied() -> None:
    for variant, is_tied in (("llama_grouped_tied", True), ("llama_head_dim", False)):
        values = hf_values(variant)
        model = LlamaForCausalLM(LlamaConfig.from_hf(values, "c"), StateDictWeights(random_tensors(values)))
        assert (model.lm_head is model.embed_tokens) == is_tied


def test_nothing_requires_gradients() -> None:
    values = hf_values("llama_biases")
    model = LlamaForCausalLM(LlamaConfig.from_hf(values, "config.json"), StateDictWeights(random_tensors(values)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(Batch.uncached([[1, 2]])).requires_grad


@pytest.mark.parametrize("variant", ["llama_dynamic_rope", "mistral_window", "qwen2_window"])
def test_everything_is_made_on_the_device_of_the_weights(variant: str) -> None:
    values = hf_values(variant)
    tensors = {name: tensor.to("meta") for name, tensor in random_tensors(values).items()}
    model = LlamaForCausalLM(LlamaConfig.from_hf(values, "config.json"), StateDictWeights(tensors))
    # The meta device computes shapes only, and refuses to be mixed with another.
    assert model.logits(model(Batch.uncached([[1] * 300, [2] * 9], "meta"))).shape == (309, 101)
    cache = PagedKVCache(model.config, num_blocks=4, device="meta")
    slots = torch.arange(64, device="meta")
    spans = (
        SequenceSpan(0, 20, 30, slots[:30]),
        SequenceSpan(20, 1, 17, slots[:17]),
        SequenceSpan(21, 1, 19, slots[:19]),
    )
    rows = torch.arange(22, device="meta")
    assert model.logits(model(Batch(rows, rows, spans), cache)).device.type == "meta"
