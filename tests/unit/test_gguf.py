"""GGUF files: weights, settings and rope scaling come back as in the model they were converted from."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.errors import CheckpointError
from models.llama.checkpoint import Checkpoint, DenseWeights, open_checkpoint
from models.llama.config import RopeConfig
from models.llama.model import LlamaForCausalLM
from tests.support.llama_variants import hf_model, hf_values, uncached_logits
from tests.support.tiny_checkpoints import random_tensors, tiny_config
from tests.support.tiny_gguf import byte_level_metadata, gguf_tensors, model_metadata, write_gguf

TOKENS = torch.randint(320, (30,), generator=torch.Generator().manual_seed(0)).tolist()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def convert(
    path: Path,
    values: dict[str, Any],
    model: nn.Module,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra_tensors: dict[str, np.ndarray] | None = None,
    **extra_metadata: Any,
) -> Path:
    """What llama.cpp's converter makes of a transformers model."""
    tensors = dict(model.named_parameters())
    metadata = model_metadata(values) | byte_level_metadata() | extra_metadata
    return write_gguf(path / "model.gguf", metadata, gguf_tensors(values, tensors) | (extra_tensors or {}), kind)


def logits_of(checkpoint: Checkpoint) -> Tensor:
    return uncached_logits(LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint)), TOKENS)


def hf_logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama1_multi_head", {}),
        ("llama_grouped_tied", {}),
        ("llama_odd_heads", {}),
        ("llama_head_dim", {}),
        ("llama_biases", {}),
        ("mistral_full", {}),
        ("mistral_window", {}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False}),
    ],
)
def test_a_converted_model_gives_the_logits_of_the_original(
    variant: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    values = hf_values(variant, vocab_size=320, **changes)
    model = hf_model(values)
    window = {"llama.attention.sliding_window": values.get("sliding_window")}
    checkpoint = open_checkpoint(str(convert(tmp_path, values, model, **window)))
    torch.testing.assert_close(logits_of(checkpoint), hf_logits(model), rtol=0, atol=1e-4)
    assert checkpoint.config.tie_word_embeddings == values["tie_word_embeddings"]
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.dense_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    shape = checkpoint.config.tensor_shapes()
    assert all(tuple(checkpoint.tensor(name).shape) == shape[name] for name in shape)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_16_bit_tensors_stay_16_bit(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    dtype = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}[kind]
    values = tiny_config()
    tensors = random_tensors(values, dtype=dtype)
    path = write_gguf(
        tmp_path / "m.gguf", model_metadata(values) | byte_level_metadata(), gguf_tensors(values, tensors), kind
    )
    checkpoint = open_checkpoint(str(path))
    for name, tensor in tensors.items():
        assert checkpoint.tensor(name).dtype is (dtype if tensor.dim() == 2 else torch.float32)
        assert checkpoint.tensor(name, narrow=True).dtype is (dtype if tensor.dim() == 2 else torch.bfloat16)
        torch.testing.assert_close(checkpoint.tensor(name).float(), tensor.float(), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "steps"), [(GGMLQuantizationType.Q8_0, 127), (GGMLQuantizationType.Q4_0, 8)])
def test_quantized_tensors_are_within_one_step_of_the_original(
    kind: GGMLQuantizationType, steps: int, tmp_path: Path
) -> None:
    values = hf_values("llama_head_dim", vocab_size=320, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    model = hf_model(values)
    checkpoint = open_checkpoint(str(convert(tmp_path, values, model, kind)))
    for name, original in model.named_parameters():
        stored = checkpoint.tensor(name)
        assert stored.dtype is torch.float32
        torch.testing.assert_close(checkpoint.tensor(name, narrow=True), stored.bfloat16(), rtol=0, atol=0)
        if original.dim() == 2:
            blocks = original.unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / steps
            error = (stored.unflatten(1, (-1, 32)) - blocks).abs()
            assert (error <= 1.01 * step).all()
            assert error.max() > 0, "nothing was quantized"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensor(name))
    torch.testing.assert_close(logits_of(checkpoint), hf_logits(model), rtol=0, atol=1e-4)


def test_transformers_reads_the_same_logits_from_the_same_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = hf_values(
        "llama_grouped_tied", vocab_size=320, hidden_size=64, num_attention_heads=4, intermediate_size=96
    )
    path = convert(tmp_path, values, hf_model(values), GGMLQuantizationType.Q4_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(open_checkpoint(str(path))), hf_logits(theirs), rtol=0, atol=1e-4)


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The factors as the converter writes them, one frequency at a time."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama3_rope_scaling_is_recovered_from_the_frequency_factors(tmp_path: Path) -> None:
    values = hf_values("llama3_rope", vocab_size=320)
    factors = llama3_factors(500.0, 32, 8.0, 1.0, 4.0, 64)
    assert len(set(factors.tolist())) > 3, "no blended frequency to recover anything from"
    model = hf_model(values)
    checkpoint = open_checkpoint(str(convert(tmp_path, values, model, extra_tensors={"rope_freqs.weight": factors})))
    assert checkpoint.hf_config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    torch.testing.assert_close(logits_of(checkpoint), hf_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "low", "high", "original"),
    [
        (5e5, 128, 8.0, 1.0, 4.0, 8192),
        (5e5, 64, 32.0, 1.0, 4.0, 8192),
        (1e4, 64, 2.5, 1.0, 6.5, 2048),
        (1e6, 128, 4.0, 2.0, 8.0, 4096),
    ],
)
def test_known_and_unknown_llama3_settings_are_recovered(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> None:
    from models.llama.gguf_rope import recover_llama3_scaling
    from models.llama.rope import inverse_frequencies

    factors = torch.from_numpy(llama3_factors(theta, head_dim, factor, low, high, original)).double()
    scaling = recover_llama3_scaling(factors, theta, head_dim, "m.gguf")
    assert scaling is not None
    # Only the ratios to low_freq_factor can be known; it comes back as 1.
    assert scaling["factor"] == factor
    assert scaling["high_freq_factor"] == pytest.approx(high / low, rel=1e-4)
    assert scaling["original_max_position_embeddings"] == original / low
    rope = RopeConfig("llama3", theta, *(scaling[key] for key in LLAMA3))
    expected = inverse_frequencies(RopeConfig("llama3", theta, factor, low, high, original), head_dim)
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "factors",
    [torch.linspace(1, 8, 32), torch.full((32,), 2.0), torch.ones(31), torch.zeros(32), torch.full((32,), torch.nan)],
)
def test_frequency_factors_of_another_kind_are_refused(factors: Tensor) -> None:
    from models.llama.gguf_rope import recover_llama3_scaling

    with pytest.raises(CheckpointError, match=r"m\.gguf.*rope_freqs\.weight"):
        recover_llama3_scaling(factors.double(), 1e4, 64, "m.gguf")


def test_frequency_factors_of_one_scale_nothing() -> None:
    from models.llama.gguf_rope import recover_llama3_scaling

    assert recover_llama3_scaling(torch.ones(32, dtype=torch.float64), 1e4, 64, "m.gguf") is None


@pytest.mark.parametrize(
    "scaling",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_rope_scaling_is_read_from_every_key(scaling: dict[str, Any], tmp_path: Path) -> None:
    values = hf_values("llama_linear_rope", vocab_size=320)
    model = hf_model(values)
    checkpoint = open_checkpoint(str(convert(tmp_path, values, model, **scaling)))
    assert checkpoint.config.rope == RopeConfig("linear", 10000.0, 4.0)
    torch.testing.assert_close(logits_of(checkpoint), hf_logits(model), rtol=0, atol=1e-4)


def tiny(tmp_path: Path, remove: str = "", tensors: dict[str, np.ndarray] | None = None, **metadata: Any) -> str:
    """A small file with something changed."""
    values = tiny_config()
    arrays = gguf_tensors(values, random_tensors(values)) | (tensors or {})
    arrays.pop(remove, None)
    entries = model_metadata(values) | byte_level_metadata() | metadata
    entries.pop(remove, None)
    return str(write_gguf(tmp_path / "m.gguf", entries, arrays))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma"}, ["gemma", "llama", "qwen2"]),
        ({"llama.expert_count": 8}, ["mixtures of experts"]),
        ({"split.count": 3}, ["llama-gguf-split"]),
        ({"remove": "llama.embedding_length"}, ["llama.embedding_length", "missing"]),
        ({"remove": "blk.1.ffn_up.weight"}, ["blk.1.ffn_up.weight", "missing"]),
        ({"remove": "tokenizer.ggml.tokens"}, ["tokenizer.ggml.tokens"]),
        ({"remove": "tokenizer.ggml.pre"}, ["tokenizer.ggml.pre", "smollm"]),
        ({"llama.attention.head_count": [4, 4]}, ["head_count", "integer"]),
        ({"llama.feed_forward_length": 64}, ["ffn_gate.weight", "(48, 32)", "(64, 32)"]),
        ({"llama.rope.dimension_count": 4}, ["only 4 of 8 channels"]),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ["yarn"]),
        ({"llama.rope.scaling.factor": 4.0, "tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, ["together"]),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, ["blk.0.attn_q_norm.weight", "unknown"]),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, ["blk.0.attn_k.bias", "missing"]),
        ({"tokenizer.ggml.eos_token_id": 999}, ["eos", "999"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["token types"]),
        ({"tokenizer.ggml.merges": ["zz yy"]}, ["zz yy"]),
        ({"tokenizer.ggml.model": "bert"}, ["bert", "gpt2"]),
        ({"tokenizer.ggml.pre": "mystery"}, ["mystery", "llama-bpe"]),
    ],
)
def test_refusals_name_the_file_and_the_problem(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny(tmp_path, **change))
    for word in ["m.gguf", *words]:
        assert word in str(caught.value)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    values = tiny_config()
    path = tiny(tmp_path)
    content = bytearray(Path(path).read_bytes())
    # In the header: name, number of dimensions, two dimensions, type.
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<I", content, at) == (GGMLQuantizationType.F32,)
    struct.pack_into("<I", content, at, GGMLQuantizationType.I32)
    Path(path).write_bytes(content)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"ffn_up.*I32"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    struct.pack_into("<I", content, at, 5)
    Path(path).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ffn_up.*type 5"):
        open_checkpoint(path)
    assert values["hidden_size"] == 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"GGUF", "damaged or cut off"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**40), "damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "damaged or cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"\xff", 4), "damaged or cut off"),
    ],
)
def test_hostile_headers_are_refused_at_once(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf") as caught:
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(tiny(tmp_path_factory.mktemp("sound"))).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_opens_or_is_a_checkpoint_error(tmp_path: Path, sound_file: bytes, data: st.DataObject) -> None:
    content = bytearray(sound_file)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 12_000)) % len(content)] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(str(path))
        for name, shape in checkpoint.config.tensor_shapes().items():
            assert tuple(checkpoint.tensor(name).shape) == shape
    except CheckpointError as error:
        assert "changed.gguf" in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_cut_off_file_is_a_checkpoint_error(tmp_path: Path, sound_file: bytes, fraction: float) -> None:
    path = tmp_path / "cut.gguf"
    # The last tensor is padded to the alignment, so up to 31 bytes may go unnoticed.
    path.write_bytes(sound_file[: int(fraction * (len(sound_file) - 32))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        open_checkpoint(str(path))


def test_a_directory_with_one_gguf_file_opens_and_with_two_asks_which(tmp_path: Path) -> None:
    tiny(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.fingerprint == open_checkpoint(str(tmp_path / "m.gguf")).fingerprint
    (tmp_path / "n.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_checkpoint(str(tmp_path))


def test_the_fingerprint_changes_with_a_weight(tmp_path: Path) -> None:
    path = Path(tiny(tmp_path))
    before = open_checkpoint(str(path)).fingerprint
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert open_checkpoint(str(path)).fingerprint != before


def test_every_id_that_ends_a_generation_is_in_the_generation_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(tmp_path, **{"tokenizer.ggml.eot_token_id": 7}))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [0, 2, 7]}  # 0: <|endoftext|>
