"""config.json of every vintage, what is refused and with which words, and the shapes that follow."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import CheckpointError
from models.llama.batch import Batch
from models.llama.config import LlamaConfig, RopeConfig
from models.llama.rope import RotaryEmbedding, inverse_frequencies
from tests.support.llama_variants import VARIANTS, hf_model, hf_values
from tests.support.tiny_checkpoints import tiny_config


def read(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf(tiny_config(**changes), "some/config.json")


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_the_transformers_model(variant: str) -> None:
    values = hf_values(variant)
    config = LlamaConfig.from_hf(values, "config.json")
    model = hf_model(values)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert config.tensor_shapes() == expected
    assert config.num_parameters == sum(math.prod(shape) for shape in expected.values())
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert list(config.linear_shapes()) == [name for name in modules if name != "lm_head"]


def test_both_spellings_of_rope_settings_are_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    values = tiny_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    del values["rope_theta"]
    assert LlamaConfig.from_hf(values, "config.json") == old
    assert old.rope == RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)
    oldest = read(rope_scaling={"type": "linear", "factor": 2})
    assert oldest.rope == RopeConfig("linear", 10000.0, 2.0)
    assert read(rope_scaling=None).rope == RopeConfig()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            ["GemmaForCausalLM", "LlamaForCausalLM", "Qwen2"],
        ),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", "MistralForCausalLM"]),
        ({"architectures": [], "model_type": None}, ["not named"]),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen3"}, ["LlamaForCausalLM with model_type qwen3"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": [["odd"]]}, ["odd"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized", "gptq", "original"]),
        ({"quantization_config": []}, ["quantization_config"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor", "missing"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["factor", "-1"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["high_freq_factor must be larger"],
        ),
        ({"rope_parameters": {"full_attention": {}, "rope_theta": 1.0}}, ["per layer type"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": float("nan")}, ["rope_theta"]),
        ({"num_key_value_heads": 3}, ["4 attention heads", "3 key-value heads"]),
        ({"hidden_size": 30}, ["30", "not a multiple", "head_dim"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "32"}, ["hidden_size", "integer"]),
        ({"vocab_size": True}, ["vocab_size", "integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "positive"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
        ({"layer_types": ["sliding_attention", "full_attention"]}, ["sliding_attention", "no window"]),
        ({"layer_types": ["chunked_attention", "full_attention"]}, ["chunked_attention"]),
        ({"layer_types": ["full_attention"]}, ["1 layers of 2"]),
        ({"layer_types": [["full_attention"]] * 2}, ["layer_types"]),
    ],
)
def test_refusals_name_the_file_and_the_problem(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    for word in ["some/config.json", *words]:
        assert word in str(caught.value)


@given(
    st.dictionaries(
        st.sampled_from(
            [*tiny_config(), "rope_scaling", "layer_types", "head_dim", "quantization_config", "sliding_window"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner)
            ),
            max_leaves=4,
        ),
    )
)
def test_any_settings_give_a_configuration_or_a_checkpoint_error(changes: dict[str, Any]) -> None:
    try:
        config = read(**changes)
    except CheckpointError as error:
        assert "some/config.json" in str(error)
    else:
        assert config.num_attention_heads % config.num_key_value_heads == 0


def test_code_that_comes_with_a_checkpoint_is_ignored() -> None:
    assert read(auto_map={"AutoModelForCausalLM": "modeling.Evil"}) == read()


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"model_type": "mistral"}, [4096] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
        ({"model_type": "mistral", "sliding_window": 9}, [9] * 3),
        ({"model_type": "llama", "sliding_window": 9}, [None] * 3),
        ({"model_type": "qwen2", "sliding_window": 9}, [None] * 3),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            [None, None, 9],
        ),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, [None] * 3),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [9, None, 9],
        ),
    ],
)
def test_sliding_windows_per_layer(settings: dict[str, Any], windows: list[int | None]) -> None:
    config = read(num_hidden_layers=3, architectures=None, **settings)
    assert [config.window(layer) for layer in range(3)] == windows


def test_token_ids_may_be_one_or_several() -> None:
    assert read(eos_token_id=[5, 7], bos_token_id=None).eos_token_ids == (5, 7)
    assert read(eos_token_id=5).eos_token_ids == (5,)
    assert read(eos_token_id=None, bos_token_id=3).bos_token_id == 3


def test_bias_settings_follow_the_architecture() -> None:
    def biased(**changes: Any) -> set[str]:
        shapes = read(architectures=None, num_hidden_layers=1, **changes).layer_linear_shapes(0)
        return {path.rpartition(".")[2] for path, shape in shapes.items() if shape.has_bias}

    assert biased() == set()
    assert biased(attention_bias=True) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biased(mlp_bias=True) == {"gate_proj", "up_proj", "down_proj"}
    assert biased(model_type="qwen2") == {"q_proj", "k_proj", "v_proj"}
    assert biased(model_type="mistral", attention_bias=True) == set()


def test_llama3_frequencies_are_those_of_transformers_for_the_real_model() -> None:
    from transformers import LlamaConfig as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    hf_config = HfConfig(head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_theta": 5e5, **rope})
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config)
    actual = inverse_frequencies(RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192), 128)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_rotation_keeps_lengths_and_depends_only_on_distance() -> None:
    config = read(head_dim=16)
    batch = Batch(torch.zeros(50, dtype=torch.int64), torch.arange(50), ())
    rotary = RotaryEmbedding(config)(batch, torch.float32)
    query, key = (torch.randn(1, 3, 16).expand(50, 3, 16) for _ in range(2))
    turned_query, turned_key = rotary.rotate(query), rotary.rotate(key)
    torch.testing.assert_close(turned_query.norm(dim=-1), query.norm(dim=-1))
    products = torch.einsum("qhd,khd->hqk", turned_query, turned_key)
    for distance in (0, 3, 11):
        diagonal = products.diagonal(-distance, dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=0, atol=1e-4)
