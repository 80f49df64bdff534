"""Hugging Face directories: what opens, what is read, and what is refused with which words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.errors import CheckpointError
from models.llama.batch import Batch
from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.llama.model import LlamaForCausalLM
from tests.support.tiny_checkpoints import random_tensors, tiny_config, tokenizer_files, write_checkpoint

INDEX = "model.safetensors.index.json"
SHARD_2 = "model-00002-of-00003.safetensors"


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_comes_back_as_it_was_written(num_shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(), dtype=dtype)
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, tensors=tensors, num_shards=num_shards)))
    for name, expected in tensors.items():
        assert checkpoint.tensor(name).dtype is dtype
        torch.testing.assert_close(checkpoint.tensor(name), expected, rtol=0, atol=0)
        narrow = expected.bfloat16() if dtype is torch.float32 else expected
        torch.testing.assert_close(checkpoint.tensor(name, narrow=True), narrow, rtol=0, atol=0)
    assert checkpoint.hf_config == tiny_config()
    assert checkpoint.generation_config == {"eos_token_id": [0, 2]}
    assert checkpoint.tokenizer_files == tokenizer_files()
    assert checkpoint.dense_bytes == 2 * sum(tensor.numel() for tensor in tensors.values())


def test_shards_without_an_index_are_read_together(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=3)
    (tmp_path / INDEX).unlink()
    tensors = random_tensors(tiny_config())
    checkpoint = open_checkpoint(str(tmp_path))
    assert all(checkpoint.tensor(name).equal(tensor) for name, tensor in tensors.items())
    shutil.copy(tmp_path / SHARD_2, tmp_path / "other.safetensors")
    assert_refused(tmp_path, "other.safetensors", SHARD_2, INDEX)


def test_an_untied_head_and_stored_frequencies_are_accepted(tmp_path: Path) -> None:
    values = tiny_config(tie_word_embeddings=False)
    tensors = random_tensors(values) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert open_checkpoint(str(write_checkpoint(tmp_path, values, tensors))).config.tie_word_embeddings is False


def test_a_tied_head_that_is_stored_again_must_be_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    copy = tensors["model.embed_tokens.weight"].clone()
    open_checkpoint(str(write_checkpoint(tmp_path, tensors=tensors | {"lm_head.weight": copy})))
    copy[5, 5] += 1
    write_checkpoint(tmp_path, tensors=tensors | {"lm_head.weight": copy})
    assert_refused(tmp_path, "lm_head.weight", "tie_word_embeddings")


def test_pickled_checkpoints_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        directory = write_checkpoint(tmp_path / name)
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(b"\x80\x02}q\x00.")
        assert_refused(directory, "safetensors", "save_pretrained", "safe_serialization=True", str(directory))
        assert_refused(directory / name, "save_pretrained")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), ["config.json", "missing"]),
        (lambda d: (d / "config.json").write_bytes(b"\xff{}"), ["config.json", "not valid JSON"]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda d: (d / "config.json").write_text("[" * 100_000), ["config.json", "not valid JSON"]),
        (lambda d: (d / "config.json").write_text("[1]"), ["config.json", "list instead of an object"]),
        (lambda d: (d / "generation_config.json").write_text("no"), ["generation_config.json"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
        (lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"), ["tokenizer.model", "AutoTokenizer"]),
        (lambda d: (d / SHARD_2).unlink(), [SHARD_2, "missing", INDEX]),
        (lambda d: (d / SHARD_2).write_bytes(b""), [SHARD_2, "damaged"]),
        (lambda d: (d / SHARD_2).write_bytes(b"\xff" * 100), [SHARD_2, "damaged"]),
        (lambda d: (d / SHARD_2).write_bytes((d / SHARD_2).read_bytes()[:-1]), [SHARD_2, "damaged"]),
        (lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), [INDEX, "weight_map"]),
        (
            lambda d: [(d / name).unlink() for name in (INDEX, *(p.name for p in d.glob("*.safetensors")))],
            ["model.safetensors"],
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    damage(write_checkpoint(tmp_path, num_shards=3))
    assert_refused(tmp_path, str(tmp_path), *words)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "model.bin", ""],
)
def test_an_index_cannot_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", num_shards=3)
    shutil.copy(directory / SHARD_2, tmp_path / "secret.safetensors")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (directory / INDEX).write_text(json.dumps(index))
    assert_refused(directory, INDEX, repr(name), "inside the checkpoint directory")


def test_wrong_tensors_are_named_with_their_file(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = random_tensors(tiny_config())

    def rewritten(**changes: Any) -> Path:
        return write_checkpoint(tmp_path, tensors={**tensors, **changes})

    assert_refused(rewritten(**{name: torch.zeros(48, 31)}), "model.safetensors", name, "(48, 31)", "(48, 32)")
    assert_refused(rewritten(**{name: torch.zeros(48, 32, dtype=torch.int8)}), "model.safetensors", name, "I8", "BF16")
    assert_refused(rewritten(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias", "unknown")
    missing = {key: value for key, value in tensors.items() if key != name}
    assert_refused(write_checkpoint(tmp_path, tensors=missing), str(tmp_path), name, "missing")
    assert_refused(write_checkpoint(tmp_path, tensors={"x": torch.zeros(1)}), "and 15 more", "missing")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    here = next(name for name, file in index["weight_map"].items() if file != SHARD_2)
    index["weight_map"][here] = SHARD_2
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, SHARD_2, here, "index")


def test_asking_for_an_unknown_tensor_names_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_changed_header_byte_opens_or_is_a_checkpoint_error(tmp_path: Path, position: int, value: int) -> None:
    directory = tmp_path / "checkpoint"
    if not directory.exists():
        write_checkpoint(directory)
        shutil.copy(directory / "model.safetensors", tmp_path / "original")
    content = bytearray((tmp_path / "original").read_bytes())
    content[position % len(content)] = value
    (directory / "model.safetensors").write_bytes(content)
    try:
        checkpoint = open_checkpoint(str(directory))
        for name, shape in checkpoint.config.tensor_shapes().items():
            assert tuple(checkpoint.tensor(name).shape) == shape
    except CheckpointError as error:
        assert str(directory) in str(error)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    first = open_checkpoint(str(write_checkpoint(tmp_path / "a", num_shards=3))).fingerprint
    assert len(first) == 64
    assert open_checkpoint(str(write_checkpoint(tmp_path / "b", num_shards=3))).fingerprint == first

    def changed(change: Callable[[Path], object]) -> str:
        directory = write_checkpoint(tmp_path / "c", num_shards=3)
        change(directory)
        fingerprint = open_checkpoint(str(directory)).fingerprint
        shutil.rmtree(directory)
        return fingerprint

    def flip_last_bit(directory: Path) -> None:
        content = bytearray((directory / SHARD_2).read_bytes())
        content[-1] ^= 1
        (directory / SHARD_2).write_bytes(content)

    others = [
        changed(flip_last_bit),
        changed(lambda d: (d / "config.json").write_text(json.dumps(tiny_config(rope_theta=9999.0)))),
        changed(lambda d: (d / "tokenizer_config.json").write_text("{}")),
    ]
    assert len({first, *others}) == 4


def test_dense_weights_widen_layers_and_leave_a_narrow_embedding_alone(tmp_path: Path) -> None:
    values = tiny_config(tie_word_embeddings=False, attention_bias=True)
    tensors = random_tensors(values, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, values, tensors)))
    weights = DenseWeights(checkpoint, torch.float32)
    assert weights.tensor("model.embed_tokens.weight").dtype is torch.bfloat16
    assert weights.tensor("lm_head.weight").dtype is torch.bfloat16
    assert weights.tensor("model.norm.weight").dtype is torch.float32
    layer = weights.linear("model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(layer.weight, tensors["model.layers.0.self_attn.q_proj.weight"].float(), rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, tensors["model.layers.0.self_attn.q_proj.bias"].float(), rtol=0, atol=0)
    assert weights.linear("model.layers.0.mlp.up_proj").bias is None
    assert DenseWeights(checkpoint, torch.float16).tensor("model.embed_tokens.weight").dtype is torch.float16
    model = LlamaForCausalLM(checkpoint.config, weights)
    assert model.logits(model(Batch.uncached([[3, 4]]))).shape == (2, 320)


def test_other_paths_are_refused_with_what_to_name_instead(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    assert_refused(directory / "model.safetensors", "the directory")
    assert_refused(tmp_path / "a" / "b" / "c", "no such file or directory")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    assert_refused(directory, "missing")
