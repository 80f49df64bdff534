"""What is written is what is read: by our reader, and by the safetensors library with a bit-by-bit decoder."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from models.artifact.format import LinearRecord, LoraForm
from models.artifact.linear import decode_linear, encode_linear
from models.artifact.reader import ArtifactReader
from models.artifact.shard import Shard, write_shard
from models.config import BuildConfig, QuantScheme
from models.types import LinearWeights
from tests.support.artifact_builder import (
    EVALUATION,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    LinearKind,
    random_linear,
    tiny_model,
    write_artifact,
)

FORMS: tuple[LoraForm, ...] = ("none", "two-factor", "single-factor")
FACTOR_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kinds() -> st.SearchStrategy[LinearKind]:
    schemes = st.builds(
        QuantScheme,
        num_bits=st.integers(2, 8),
        group_size=st.sampled_from((-1, 32, 64, 128)),
        is_symmetric=st.booleans(),
    )
    return st.builds(
        LinearKind,
        scheme=schemes,
        rank=st.integers(1, 7),
        form=st.sampled_from(FORMS),
        factor_dtype=st.sampled_from(FACTOR_DTYPES),
        has_bias=st.booleans(),
        has_input_scale=st.booleans(),
        has_channel_order=st.booleans(),
    )


def parts(weights: LinearWeights) -> dict[str, Tensor | None]:
    quantized, correction = weights.quantized, weights.correction
    return {
        "codes": quantized.codes,
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        "lora_up": None if correction is None else correction.lora_up,
        "lora_down": None if correction is None else correction.lora_down,
        "input_scale": weights.input_scale,
        "channel_order": weights.channel_order,
        "bias": weights.bias,
    }


def assert_same(found: LinearWeights, wanted: LinearWeights) -> None:
    assert found.quantized.scheme == wanted.quantized.scheme
    for name, tensor in parts(wanted).items():
        other = parts(found)[name]
        if tensor is None:
            assert other is None, name
        else:
            assert other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor), name


def bits_of(row: Tensor, num_bits: int, num_values: int) -> list[int]:
    """Decode one packed row as one large integer: element i is bits i * num_bits and up."""
    number = int.from_bytes(bytes(row.tolist()), "little")
    return [(number >> (index * num_bits)) & ((1 << num_bits) - 1) for index in range(num_values)]


@settings(max_examples=60, deadline=None)
@given(kind=kinds(), rows=st.integers(1, 19), num_blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_kind_of_linear_layer_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, kind: LinearKind, rows: int, num_blocks: int, seed: int
) -> None:
    columns = num_blocks * (24 if kind.scheme.group_size == -1 else kind.scheme.group_size)
    weights = random_linear(rows, columns, kind, torch.Generator().manual_seed(seed))
    file = tmp_path_factory.mktemp("shard") / "layer.safetensors"
    write_shard(file, encode_linear("proj", weights))
    with Shard(file) as shard:
        assert_same(decode_linear("proj", LinearRecord.of(weights, 0.1), shard.read), weights)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_the_bytes_on_disk_are_the_format_that_the_description_promises(tmp_path: Path, num_bits: int) -> None:
    kind = LinearKind(scheme=QuantScheme(num_bits=num_bits, group_size=32))
    weights = random_linear(13, 64, kind, torch.Generator().manual_seed(num_bits))
    write_shard(tmp_path / "layer.safetensors", encode_linear("proj", weights))
    with safe_open(tmp_path / "layer.safetensors", "pt") as library:
        packed, zero_point = library.get_tensor("proj.weight_packed"), library.get_tensor("proj.weight_zero_point")
        assert torch.equal(library.get_tensor("proj.weight_scale"), weights.quantized.scale)
    assert packed.shape == (13, math.ceil(64 * num_bits / 8))
    assert zero_point.shape == (2, math.ceil(13 * num_bits / 8))
    assert weights.quantized.zero_point is not None
    assert [bits_of(row, num_bits, 64) for row in packed] == weights.quantized.codes.tolist()
    assert [bits_of(row, num_bits, 13) for row in zero_point] == weights.quantized.zero_point.T.tolist()


def test_a_whole_artifact_gives_back_everything_that_went_in(tmp_path: Path) -> None:
    model = tiny_model(LinearKind(has_input_scale=True, has_channel_order=True), attention_bias=True)
    manifest = write_artifact(tmp_path / "art", model)
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert reader.manifest == manifest
        assert reader.config == model.config
        assert reader.hf_config == model.hf_config
        assert reader.generation_config == GENERATION_CONFIG
        assert reader.tokenizer_files == TOKENIZER_FILES
        for path, weights in model.linears.items():
            assert_same(reader.linear(path), weights)
        for name, tensor in model.tensors.items():
            assert torch.equal(reader.tensor(name), tensor)


def test_tensors_outlive_the_reader(tmp_path: Path) -> None:
    model = tiny_model()
    write_artifact(tmp_path / "art", model)
    with ArtifactReader.open(tmp_path / "art") as reader:
        norm = reader.tensor("model.norm.weight")
    (tmp_path / "art" / "model-00003-of-00003.safetensors").unlink()
    assert torch.equal(norm, model.tensors["model.norm.weight"])


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    write_artifact(tmp_path / "art", tiny_model(tie_word_embeddings=True))
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert "lm_head.weight" not in reader.manifest.tensors
        assert "model.embed_tokens.weight" in reader.manifest.tensors


def test_the_safetensors_library_reads_every_shard_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    model = tiny_model()
    write_artifact(tmp_path / "art", model)
    weight_map = json.loads((tmp_path / "art" / "model.safetensors.index.json").read_bytes())["weight_map"]
    found = {}
    for shard in sorted(set(weight_map.values())):
        with safe_open(tmp_path / "art" / shard, "pt") as library:
            assert library.metadata() == {"format": "pt"}
            for name in library.keys():  # noqa: SIM118 (not a mapping)
                assert weight_map[name] == shard
                found[name] = library.get_tensor(name)
    assert found.keys() == weight_map.keys()
    for name, tensor in model.tensors.items():
        assert torch.equal(found[name], tensor)


def test_one_shard_holds_one_decoder_layer_and_their_names_sort_in_network_order(tmp_path: Path) -> None:
    write_artifact(tmp_path / "art", tiny_model(num_hidden_layers=11))
    shards = sorted(file.name for file in (tmp_path / "art").glob("*.safetensors"))
    assert len(shards) == 12
    for layer_index, shard in enumerate(shards[:-1]):
        with safe_open(tmp_path / "art" / shard, "pt") as library:
            assert all(name.startswith(f"model.layers.{layer_index}.") for name in library.keys())  # noqa: SIM118
    with safe_open(tmp_path / "art" / shards[-1], "pt") as library:
        assert set(library.keys()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    "kind",
    [
        LinearKind(scheme=QuantScheme(num_bits=bits, group_size=size, is_symmetric=symmetric), form=form)
        for bits, size, symmetric, form in itertools.product((3, 4), (-1, 32), (True, False), FORMS)
    ],
    ids=str,
)
def test_effective_bits_are_the_bits_that_the_files_really_take(tmp_path: Path, kind: LinearKind) -> None:
    manifest = write_artifact(tmp_path / "art", tiny_model(kind))
    num_weights = sum(record.in_features * record.out_features for record in manifest.linears.values())
    stored = 0
    for shard in (tmp_path / "art").glob("*.safetensors"):
        with safe_open(shard, "pt") as library:
            for name in library.keys():  # noqa: SIM118
                if name.rpartition(".")[0] in manifest.linears:
                    stored += library.get_tensor(name).nbytes
    assert manifest.effective_bits == pytest.approx(8 * stored / num_weights, rel=1e-12)


def test_the_manifest_adds_up_and_keeps_the_build(tmp_path: Path) -> None:
    model = tiny_model()
    build = BuildConfig(quantizer="rtn")
    manifest = write_artifact(tmp_path / "art", model, build=build)
    assert manifest.build == build
    assert manifest.evaluation == EVALUATION
    tensor_bytes = 0
    for shard in (tmp_path / "art").glob("*.safetensors"):
        length = int.from_bytes(shard.read_bytes()[:8], "little")
        tensor_bytes += shard.stat().st_size - 8 - length
    assert sum(manifest.component_bytes.values()) == tensor_bytes
    on_disk = {file.name: file.stat().st_size for file in (tmp_path / "art").iterdir()}
    assert manifest.artifact_bytes == sum(on_disk.values()) - on_disk["quantization.json"]
    parameters = sum(tensor.numel() for tensor in model.tensors.values())
    parameters += sum(weights.quantized.codes.numel() for weights in model.linears.values())
    assert manifest.dense_bytes == 2 * parameters


def test_two_builds_from_the_same_inputs_are_identical_byte_for_byte(tmp_path: Path) -> None:
    for name in ("first", "elsewhere/second"):
        write_artifact(tmp_path / name, tiny_model(LinearKind(has_input_scale=True), seed=7))
    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_the_order_in_which_inputs_are_given_does_not_show(tmp_path: Path) -> None:
    model = tiny_model()
    reordered = type(model)(
        dict(reversed(model.hf_config.items())),
        dict(reversed(model.linears.items())),
        dict(reversed(model.tensors.items())),
    )
    write_artifact(tmp_path / "a", model)
    write_artifact(tmp_path / "b", reordered, tokenizer_files=dict(reversed(TOKENIZER_FILES.items())))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
