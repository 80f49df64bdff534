"""Values that no network can run with, and changes at random: refused, or without effect on any weight."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.reader import ArtifactReader
from models.errors import ArtifactError
from models.quant.grid import dequantize
from tests.support.artifact_builder import (
    LinearKind,
    content,
    join_shard,
    mixed_model,
    sign,
    sign_again,
    split_shard,
    write_artifact,
)

SHARD = "model-00001-of-00003.safetensors"
PATH = "model.layers.0.self_attn.q_proj"
MX_SHARD = "model-00002-of-00003.safetensors"
MX = "model.layers.1.self_attn.q_proj"
UP, SCALE = f"{PATH}.lora_up", f"{PATH}.weight_scale"
Draw = Callable[[st.SearchStrategy[Any]], Any]
KIND = LinearKind(has_input_scale=True, has_channel_order=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lies") / "art"
    write_artifact(directory, mixed_model(KIND))
    return directory


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "art"))


def poke(artifact: Path, tensor: str, value: torch.Tensor, shard: str = SHARD) -> None:
    """Overwrite a tensor's first element and make every hash right."""
    header, data = split_shard(artifact / shard)
    start = header[tensor]["data_offsets"][0]
    raw = bytes(value.reshape(1).view(torch.uint8).tolist())
    join_shard(artifact / shard, header, data[:start] + raw + data[start + len(raw) :])
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


@pytest.mark.parametrize("tensor", ["weight_scale", "lora_up_scale", "lora_down_scale"])
@pytest.mark.parametrize("exponent", [0, 255])
def test_an_exponent_that_stands_for_no_usable_scale_is_refused(artifact: Path, tensor: str, exponent: int) -> None:
    poke(artifact, f"{MX}.{tensor}", torch.tensor(exponent, dtype=torch.uint8), MX_SHARD)
    with ArtifactReader.open(artifact, verify="structure") as reader, pytest.raises(ArtifactError) as caught:
        reader.linear(MX)
    assert f"{artifact / MX_SHARD}: tensor {MX}.{tensor}:" in str(caught.value)


@pytest.mark.parametrize("exponent", [1, 254])
def test_every_other_exponent_is_a_power_of_two(artifact: Path, exponent: int) -> None:
    poke(artifact, f"{MX}.weight_scale", torch.tensor(exponent, dtype=torch.uint8), MX_SHARD)
    with ArtifactReader.open(artifact, verify="structure") as reader:
        assert float(reader.linear(MX).quantized.scale[0, 0]) == 2.0 ** (exponent - 127)


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
