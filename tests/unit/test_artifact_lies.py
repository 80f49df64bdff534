"""Lies with every hash made right again: what is left to notice is that the parts contradict each other."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.format import MAX_JSON_BYTES
from models.artifact.reader import ArtifactReader
from models.artifact.shard import MAX_HEADER_BYTES
from models.errors import ArtifactError
from models.quant.affine import dequantize
from tests.support.artifact_builder import (
    LinearKind,
    content,
    join_shard,
    sign,
    sign_again,
    split_shard,
    tiny_model,
    write_artifact,
)

SHARD = "model-00001-of-00003.safetensors"
PATH = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
UP, PACKED, SCALE = f"{PATH}.lora_up", f"{PATH}.weight_packed", f"{PATH}.weight_scale"
Values = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
KIND = LinearKind(has_input_scale=True, has_channel_order=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lies") / "art"
    write_artifact(directory, tiny_model(KIND))
    return directory


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "art"))


def refusal(directory: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        ArtifactReader.open(directory).close()
    return str(caught.value)


def entry(**changes: object) -> Callable[[Values], None]:
    """Change the header's entry of ``UP``."""
    return lambda header: header[UP].update(changes)


def move(by: int) -> Callable[[Values], None]:
    """Move ``UP`` in the data without changing its size."""
    return lambda header: header[UP].update(data_offsets=[offset + by for offset in header[UP]["data_offsets"]])


HEADER_LIES: dict[str, Callable[[Values], object]] = {
    "another shape of the same size": entry(shape=[4, 32]),
    "a shape of more dimensions": entry(shape=[32, 4, 1]),
    "a shape of another size": entry(shape=[32, 5]),
    "a shape whose product overflows 64 bits": entry(shape=[1 << 62, 1 << 62]),
    "a shape with a number beyond 64 bits": entry(shape=[1 << 70, 0]),
    "a negative shape": entry(shape=[-32, -4]),
    "a fractional shape": entry(shape=[32.0, 4]),
    "a boolean shape": entry(shape=[True, 4]),
    "a shape that is no list": entry(shape="32,4"),
    "no elements": entry(shape=[0, 4], data_offsets=[0, 0]),
    "another type of the same size": entry(dtype="F16"),
    "a type of another size": entry(dtype="F32"),
    "an unknown type": entry(dtype="F8_E4M3"),
    "a type that is no text": entry(dtype=["BF16"]),
    "overlapping offsets": move(-2),
    "a gap": move(2),
    "offsets beyond the file": move(1 << 40),
    "negative offsets": move(-(1 << 20)),
    "offsets in reverse": entry(data_offsets=[256, 0]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 256, 512]),
    "offsets that are no numbers": entry(data_offsets=[None, "256"]),
    "an unknown key": entry(stride=[1]),
    "an entry that is no object": lambda header: header.update({UP: [1, 2]}),
    "an entry without a shape": lambda header: header[UP].pop("shape"),
    "a missing tensor": lambda header: header.pop(UP),
    "two tensors exchanged": lambda header: header.update({UP: header[PACKED], PACKED: header[UP]}),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_lie_in_a_header_names_the_file_and_the_tensor(artifact: Path, lie: str) -> None:
    header, data = split_shard(artifact / SHARD)
    HEADER_LIES[lie](header)
    join_shard(artifact / SHARD, header, data)
    sign_again(artifact)
    message = refusal(artifact)
    assert str(artifact / SHARD) in message
    names = [UP, PACKED] if lie == "two tensors exchanged" else [UP]
    if lie in {"overlapping offsets", "a gap", "no elements", "a missing tensor"}:
        assert "tensor " in message  # the tensor that begins where another should end is as good a culprit
    else:
        assert any(f"tensor {name}:" in message or f"tensor '{name}':" in message for name in names)


def test_a_tensor_too_many_is_named(artifact: Path) -> None:
    header, data = split_shard(artifact / SHARD)
    header["model.layers.0.extra"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    join_shard(artifact / SHARD, header, data + b"abc")
    sign_again(artifact)
    assert "'model.layers.0.extra'" in refusal(artifact)


BROKEN_HEADERS = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "invalid UTF-8": b'{"\xff": 1}',
    "a name that occurs twice": b'{"a": {}, "a": {}}',
    "NaN": b'{"a": NaN}',
    "a number beyond float64": b'{"a": 1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nested too deep": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nothing but metadata": b'{"__metadata__": {}}',
    "a lone surrogate": b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_a_broken_header_names_the_file(artifact: Path, kind: str) -> None:
    join_shard(artifact / SHARD, BROKEN_HEADERS[kind], split_shard(artifact / SHARD)[1])
    sign_again(artifact)
    assert str(artifact / SHARD) in refusal(artifact)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_false_header_length_names_the_file(artifact: Path, length: int) -> None:
    data = (artifact / SHARD).read_bytes()
    (artifact / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    sign_again(artifact)
    assert str(artifact / SHARD) in refusal(artifact)


def record(**changes: object) -> Callable[[Values], None]:
    """Change the record of ``PATH``."""
    return lambda values: values["linears"][PATH].update(changes)


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


def poke(artifact: Path, tensor: str, value: torch.Tensor) -> None:
    """Overwrite a tensor's first element and make every hash right."""
    header, data = split_shard(artifact / SHARD)
    start = header[tensor]["data_offsets"][0]
    raw = bytes(value.reshape(1).view(torch.uint8).tolist())
    join_shard(artifact / SHARD, header, data[:start] + raw + data[start + len(raw) :])
    sign_again(artifact)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (SCALE, torch.tensor(0, dtype=torch.float16)),
        (SCALE, torch.tensor(-0.5, dtype=torch.float16)),
        (SCALE, torch.tensor(float("inf"), dtype=torch.float16)),
        (SCALE, torch.tensor(float("nan"), dtype=torch.float16)),
        (UP, torch.tensor(float("nan"), dtype=torch.bfloat16)),
        (f"{PATH}.lora_down", torch.tensor(float("-inf"), dtype=torch.bfloat16)),
        (f"{PATH}.input_scale", torch.tensor(0.0)),
        (f"{PATH}.input_scale", torch.tensor(float("nan"))),
        (f"{PATH}.channel_order", torch.tensor(-1, dtype=torch.int32)),
        (f"{PATH}.channel_order", torch.tensor(32, dtype=torch.int32)),
        (f"{PATH}.channel_order", torch.tensor(2**31 - 1, dtype=torch.int32)),
    ],
)
def test_a_value_no_network_can_run_with_is_refused_when_its_layer_is_read(
    artifact: Path, tensor: str, value: torch.Tensor
) -> None:
    poke(artifact, tensor, value)
    with ArtifactReader.open(artifact, verify="structure") as reader:
        reader.linear("model.layers.0.self_attn.k_proj")
        with pytest.raises(ArtifactError) as caught:
            reader.linear(PATH)
    assert f"{artifact / SHARD}: tensor {tensor}:" in str(caught.value)


def test_a_norm_that_is_not_finite_is_refused_when_it_is_read(artifact: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    poke(artifact, name, torch.tensor(float("nan"), dtype=torch.bfloat16))
    with ArtifactReader.open(artifact, verify="structure") as reader, pytest.raises(ArtifactError, match=name):
        reader.tensor(name)


def test_a_name_that_is_not_there_is_refused(original: Path) -> None:
    with ArtifactReader.open(original) as reader:
        with pytest.raises(ArtifactError, match="no tensor 'model"):
            reader.tensor("model.nothing")
        with pytest.raises(ArtifactError, match="no linear layer 'model"):
            reader.linear("model.nothing")


def json_values() -> st.SearchStrategy[Any]:
    numbers = st.integers() | st.integers(-3, 70) | st.floats(allow_nan=False, allow_infinity=False)
    names = st.text(max_size=8) | st.sampled_from([UP, PATH, SHARD, "shape", "F16", "../x"])
    return st.recursive(
        st.none() | st.booleans() | numbers | names,
        lambda children: st.lists(children, max_size=4) | st.dictionaries(names, children, max_size=4),
        max_leaves=6,
    )


def replace_somewhere(draw: Draw, values: Any) -> None:
    """Walk into a JSON value at random and replace, remove or add one thing."""
    while True:
        keys = list(range(len(values))) if isinstance(values, list) else sorted(values)
        key = draw(st.sampled_from(keys))
        if isinstance(values[key], dict | list) and values[key] and draw(st.integers(0, 9)):
            values = values[key]
            continue
        action = draw(st.sampled_from(("replace", "remove", "add")))
        if action == "remove":
            del values[key]
        elif action == "add" and isinstance(values, dict):
            values[draw(st.text(max_size=5))] = draw(json_values())
        else:
            values[key] = draw(json_values())
        return


def whole_content(directory: Path) -> dict[str, torch.Tensor]:
    """Everything the network would compute with."""
    with ArtifactReader.open(directory) as reader:
        found = {name: reader.tensor(name) for name in reader.manifest.tensors if reader.manifest.tensors[name]}
        for path in reader.manifest.linears:
            found[path] = dequantize(reader.linear(path).quantized)
        return found


@pytest.fixture(scope="module")
def before(original: Path) -> dict[str, torch.Tensor]:
    return whole_content(original)


def assert_refused_or_unchanged(directory: Path, original: dict[str, torch.Tensor]) -> None:
    try:
        found = whole_content(directory)
    except ArtifactError as error:
        assert str(directory) in str(error)
        return
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_change_of_the_manifest_is_refused_or_changes_no_weight(
    original: Path, before: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    values = json.loads((original / "quantization.json").read_bytes())
    replace_somewhere(data.draw, values)
    with content(original / "quantization.json", sign(values)):
        assert_refused_or_unchanged(original, before)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_change_of_a_header_is_refused_or_changes_no_weight(
    original: Path, before: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    shard, manifest = (original / name for name in (SHARD, "quantization.json"))
    header, body = split_shard(shard)
    replace_somewhere(data.draw, header)
    with content(shard, shard.read_bytes()), content(manifest, manifest.read_bytes()):
        join_shard(shard, header, body)
        sign_again(original)
        assert_refused_or_unchanged(original, before)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_change_of_the_configuration_is_refused_or_changes_no_weight(
    original: Path, before: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    config, manifest = (original / name for name in ("config.json", "quantization.json"))
    values = json.loads(config.read_bytes())
    replace_somewhere(data.draw, values)
    with content(config, config.read_bytes()), content(manifest, manifest.read_bytes()):
        config.write_text(json.dumps(values))
        sign_again(original)
        assert_refused_or_unchanged(original, before)
