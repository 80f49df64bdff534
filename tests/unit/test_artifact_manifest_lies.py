"""A manifest, configuration or index that lies, every hash made right again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifact.format import MAX_JSON_BYTES
from tests.support.artifact_builder import (
    LinearKind,
    mixed_model,
    refusal,
    sign,
    sign_again,
    write_artifact,
)

SHARD = "model-00001-of-00003.safetensors"
PATH = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
MX = "model.layers.1.self_attn.q_proj"
UP, PACKED = f"{PATH}.lora_up", f"{PATH}.weight_packed"
Values = dict[str, Any]
KIND = LinearKind(has_input_scale=True, has_channel_order=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lies") / "art"
    write_artifact(directory, mixed_model(KIND))
    return directory


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "art"))


def record(**changes: object) -> Callable[[Values], None]:
    """Change the record of ``PATH``."""
    return lambda values: values["linears"][PATH].update(changes)


def mx_record(**changes: object) -> Callable[[Values], None]:
    """Change the record of ``MX``, a layer of MXINT4 with MXINT6 factors, a rotation and quantized activations."""
    return lambda values: values["linears"][MX].update(changes)


def mx_scheme(**changes: object) -> Callable[[Values], None]:
    return lambda values: values["linears"][MX]["scheme"].update(changes)


def mx_activations(**changes: object) -> Callable[[Values], None]:
    return lambda values: values["linears"][MX]["activations"].update(changes)


def listed(**changes: object) -> Callable[[Values], None]:
    """Change what the manifest says of the tensor ``UP``."""
    return lambda values: values["tensors"][UP].update(changes)


def rename_file(name: str) -> Callable[[Values], None]:
    """List the tokenizer under another file name."""
    return lambda values: values["files"].update({name: values["files"].pop("tokenizer.json")})


MANIFEST_LIES: dict[str, tuple[Callable[[Values], object], str]] = {
    "more bits": (lambda v: v["linears"][PATH]["scheme"].update(num_bits=5), PACKED),
    "larger groups": (lambda v: v["linears"][DOWN]["scheme"].update(group_size=64), f"{DOWN}.weight_scale"),
    "a group size that is none": (lambda v: v["linears"][PATH]["scheme"].update(group_size=48), "group_size"),
    "a group size that does not divide": (lambda v: v["linears"][PATH]["scheme"].update(group_size=128), PATH),
    "symmetric": (lambda v: v["linears"][PATH]["scheme"].update(is_symmetric=True), f"{PATH}.weight_zero_point"),
    "a lower rank": (record(rank=3), UP),
    "no rank": (record(rank=0), PATH),
    "another form": (record(lora_form="single-factor"), f"{PATH}.lora_down"),
    "another factor type": (record(factor_dtype="float16"), f"{PATH}.lora_"),
    "no correction at all": (record(rank=0, lora_form="none", factor_dtype=None), f"{PATH}.lora_down"),
    "another shape": (record(out_features=16), PATH),
    "a bias": (record(has_bias=True), f"{PATH}.bias"),
    "no input scale": (record(has_input_scale=False), f"{PATH}.input_scale"),
    "no channel order": (record(has_channel_order=False), f"{PATH}.channel_order"),
    "a format that is none": (mx_scheme(format="fp8"), "scheme"),
    "a format with other scales": (mx_scheme(format="int", is_symmetric=True), f"{MX}.weight_scale"),
    "float scales of nf4": (mx_scheme(format="nf4"), f"{MX}.weight_scale"),
    "a group size of another format": (mx_scheme(group_size=64), "group_size"),
    "blocks of 16": (mx_scheme(group_size=16), f"{MX}.weight_scale"),
    "a width that the format does not have": (mx_scheme(format="mxfp4", num_bits=6), "num_bits"),
    "plain factors for quantized ones": (mx_record(factor_dtype="bfloat16"), f"{MX}.lora_"),
    "factors of other bits": (mx_record(factor_dtype="mxint8"), f"{MX}.lora_"),
    "factors of another grid": (mx_record(factor_dtype="int8"), f"{MX}.lora_"),
    "factors that are none": (mx_record(factor_dtype="int2"), MX),
    "a single factor whose groups do not divide": (mx_record(lora_form="single-factor"), "lora_up"),
    "quantized factors for plain ones": (record(factor_dtype="int8"), f"{PATH}.lora_"),
    "a single factor wider than its input": (record(lora_form="single-factor", rank=33), "reads 33 channels of 32"),
    "a rotation that does not divide": (mx_record(rotation_block=24), "rotation_block 24 does not divide 32"),
    "a rotation that no matrix has": (
        lambda v: v["linears"]["model.layers.1.mlp.down_proj"].update(rotation_block=1 << 30),
        "rotation_block",
    ),
    "a negative rotation": (mx_record(rotation_block=-16), "rotation_block"),
    "a rotation that is no number": (mx_record(rotation_block="16"), "rotation_block"),
    "no rotation at all": (lambda v: v["linears"][MX].pop("rotation_block"), "rotation_block"),
    "activations of a format that is none": (mx_activations(format="nf4"), "activations"),
    "activations of too many bits": (mx_activations(num_bits=9), "num_bits is 9"),
    "activation groups that do not divide": (mx_activations(group_size=64), "group_size 64 does not divide"),
    "activations with too wide a clip": (mx_activations(clip_ratio=1.5), "clip_ratio is 1.5"),
    "attention groups that do not divide": (
        lambda v: v["build"].update(attention={"group_size": 64}),
        "'build': attention: group_size 64 does not divide the 32 channels of the keys and values",
    ),
    "attention of a format that is none": (lambda v: v["build"].update(attention={"format": "nf4"}), "attention"),
    "activations that are none": (mx_record(activations="int8"), "activations"),
    "other effective bits": (record(effective_bits=3.0), PATH),
    "a negative error": (record(relative_weight_error=-1.0), PATH),
    "text for a number": (record(rank="4"), PATH),
    "a fraction for a count": (record(rank=4.0), PATH),
    "a number for a truth": (record(has_bias=0), PATH),
    "an unknown field": (record(mystery=1), PATH),
    "a missing record": (lambda v: v["linears"].pop(PATH), PATH),
    "a record too many": (lambda v: v["linears"].update({"model.layers.9.x": v["linears"][PATH]}), "model.layers.9.x"),
    "a missing tensor": (lambda v: v["tensors"].pop(UP), UP),
    "a tensor too many": (lambda v: v["tensors"].update({"model.extra": v["tensors"][UP]}), "model.extra"),
    "another tensor shape": (listed(shape=[4, 32]), UP),
    "a negative tensor shape": (listed(shape=[-1, 4]), UP),
    "another tensor type": (listed(dtype="F16"), UP),
    "an unknown tensor type": (listed(dtype="F64"), UP),
    "another shard": (listed(file="model-00002-of-00003.safetensors"), UP),
    "a shard that is not there": (listed(file="model-00009-of-00003.safetensors"), UP),
    "a shard elsewhere": (listed(file="../model.safetensors"), UP),
    "other sums": (lambda v: v["component_bytes"].update(packed=1), "component_bytes"),
    "a missing sum": (lambda v: v["component_bytes"].pop("packed"), "component_bytes"),
    "other mean bits": (lambda v: v.update(effective_bits=2.0), "effective_bits"),
    "another dense size": (lambda v: v.update(dense_bytes=1), "dense_bytes"),
    "an unknown top-level field": (lambda v: v.update(mystery=1), "mystery"),
    "no files": (lambda v: v.update(files={}), "config.json"),
    "no records": (lambda v: v.update(linears={}), PATH.rpartition(".")[0].rpartition(".")[0]),
    "one shard less": (lambda v: v["files"].pop("model-00002-of-00003.safetensors"), "model-00002"),
    "a build that is none": (lambda v: v["build"].update(quantizer=3), "quantizer"),
    "a build with a bad budget": (lambda v: v["build"].update(budget={"target_bits": 4.0, "num_bits": []}), "budget"),
    "a build with a bad transform": (lambda v: v["build"]["transform"].update(flatten=2.0), "flatten"),
    "a build with a bad scheme": (lambda v: v["build"]["scheme"].update(num_bits=9), "num_bits"),
    "a path upwards": (rename_file("../tokenizer.json"), "files"),
    "an absolute path": (rename_file("/etc/passwd"), "files"),
    "a path downwards": (rename_file("sub/tokenizer.json"), "files"),
    "a path of another system": (rename_file("..\\tokenizer.json"), "files"),
    "a hidden file": (rename_file(".tokenizer.json"), "files"),
    "a null byte": (rename_file("tok\0enizer.json"), "files"),
    "an empty name": (rename_file(""), "files"),
    "the directory itself": (rename_file("."), "files"),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_a_lie_in_the_manifest_names_what_it_is_about(artifact: Path, lie: str) -> None:
    change, named = MANIFEST_LIES[lie]
    (artifact.parent / "tokenizer.json").write_bytes((artifact / "tokenizer.json").read_bytes())
    sign_again(artifact, change)
    message = refusal(artifact)
    assert str(artifact) in message
    assert named in message


@pytest.mark.parametrize("version", ["qerve-2", "qerve-0", "", None, 1, ["qerve-1"]])
def test_another_format_version_is_told_apart_from_damage(artifact: Path, version: object) -> None:
    sign_again(artifact, lambda values: values.update(format=version))
    message = refusal(artifact)
    assert f"format {version!r}" in message
    assert "reads 'qerve-1'" in message
    assert "damaged" not in message


def test_a_manifest_spelled_differently_is_refused(artifact: Path) -> None:
    values = json.loads((artifact / "quantization.json").read_bytes())
    (artifact / "quantization.json").write_text(json.dumps(values, indent=1))
    assert "does not match its manifest_sha256" in refusal(artifact)


@pytest.mark.parametrize("name", ["quantization.json", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_file_too_large_to_be_true_is_not_read(artifact: Path, name: str) -> None:
    os.truncate(artifact / name, MAX_JSON_BYTES + 1)
    if name != "quantization.json":
        values = json.loads((artifact / "quantization.json").read_bytes())
        values["files"][name]["num_bytes"] = MAX_JSON_BYTES + 1
        (artifact / "quantization.json").write_bytes(sign(values))
    message = refusal(artifact)
    assert str(artifact / name) in message
    assert "more than" in message


CONFIG_LIES: dict[str, tuple[object, str]] = {
    "another architecture": ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "config.json"),
    "more layers": ({"num_hidden_layers": 3}, "config.json"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "config.json"),
    "a wider network": ({"hidden_size": 64}, "model.layers.0"),
    "a larger vocabulary": ({"vocab_size": 41}, "model.embed_tokens.weight"),
    "a tied head": ({"tie_word_embeddings": True}, "lm_head.weight"),
    "biases": ({"attention_bias": True}, PATH),
    "text for a number": ({"hidden_size": "32"}, "config.json"),
    "a negative number": ({"hidden_size": -32}, "config.json"),
    "nothing for a number": ({"vocab_size": None}, "config.json"),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_configuration_that_does_not_fit_is_refused(artifact: Path, lie: str) -> None:
    changes, named = CONFIG_LIES[lie]
    values = json.loads((artifact / "config.json").read_bytes())
    assert isinstance(changes, dict)
    (artifact / "config.json").write_text(json.dumps({**values, **changes}))
    sign_again(artifact)
    assert named in refusal(artifact)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"a": 1, "a": 2}', "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_configuration_that_is_no_json_object_is_refused(artifact: Path, name: str, text: str) -> None:
    (artifact / name).write_text(text)
    sign_again(artifact)
    assert str(artifact / name) in refusal(artifact)


@pytest.mark.parametrize("shard", ["model-00002-of-00003.safetensors", "model-00009-of-00003.safetensors"])
def test_a_tensor_placed_elsewhere_by_manifest_and_index_alike_is_named(artifact: Path, shard: str) -> None:
    index = json.loads((artifact / "model.safetensors.index.json").read_bytes())
    index["weight_map"][UP] = shard
    text = json.dumps(index, sort_keys=True, indent=2) + "\n"
    (artifact / "model.safetensors.index.json").write_text(text)
    sign_again(artifact, listed(file=shard))
    assert f"{artifact / 'quantization.json'}: tensor {UP}: listed in {shard}" in refusal(artifact)


INDEX_LIES: dict[str, Callable[[Values], object]] = {
    "another shard": lambda index: index["weight_map"].update({UP: "model-00002-of-00003.safetensors"}),
    "a missing tensor": lambda index: index["weight_map"].pop(UP),
    "no name": lambda index: index["weight_map"].update({UP: None}),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_that_disagrees_names_the_tensor(artifact: Path, lie: str) -> None:
    file = artifact / "model.safetensors.index.json"
    values = json.loads(file.read_bytes())
    INDEX_LIES[lie](values)
    file.write_text(json.dumps(values))
    sign_again(artifact)
    message = refusal(artifact)
    assert str(file) in message
    assert f"tensor {UP}:" in message
