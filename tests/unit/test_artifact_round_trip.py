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

from models.artifact.linear import decode_linear, encode_linear
from models.artifact.reader import ArtifactReader
from models.artifact.record import LinearRecord, LoraForm
from models.artifact.shard import Shard, write_shard
from models.config import (
    BudgetConfig,
    BuildConfig,
    FactorDtype,
    LayerConfig,
    QuantizerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.quant.factors import FACTOR_SCHEMES, FLOAT_FACTORS
from models.scheme import GROUP_SIZES, ActivationScheme, QuantScheme
from models.types import Factor, LinearWeights, QuantizedWeight
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
FACTOR_DTYPES: tuple[FactorDtype, ...] = (*FLOAT_FACTORS, *FACTOR_SCHEMES)
EXPONENTS = [QuantScheme(4, size, format="mxint") for size in (16, 32)] + [QuantScheme(4, 32, format="mxfp4")]
SCHEMES = [
    *(
        QuantScheme(bits, size, is_symmetric)
        for bits in (2, 3, 8)
        for size in (-1, 32)
        for is_symmetric in (False, True)
    ),
    *EXPONENTS,
    QuantScheme(6, 32, format="mxint", exponent="ceil"),
    QuantScheme(4, 32, format="nf4"),
]
ACTIVATIONS = (
    None,
    ActivationScheme(),
    ActivationScheme(4, 32, True),
    ActivationScheme(6, 16, format="mxint", exponent="ceil"),
    ActivationScheme(4, 32, format="mxfp4"),
)


@st.composite
def kinds(draw: st.DrawFn) -> tuple[LinearKind, int, int]:
    """A kind of layer, with numbers of rows and columns that it is possible for."""
    form = draw(st.sampled_from(FORMS))
    factor_dtype = draw(st.sampled_from(FACTOR_DTYPES))
    scheme_format = draw(st.sampled_from(sorted(GROUP_SIZES)))
    scheme = QuantScheme(
        4 if scheme_format in {"mxfp4", "nf4"} else draw(st.integers(2, 8)),
        draw(st.sampled_from([size for size in GROUP_SIZES[scheme_format] if size <= 128])),
        draw(st.booleans()),
        scheme_format,
        draw(st.sampled_from(("floor", "ceil"))),
    )
    has_groups = factor_dtype in FACTOR_SCHEMES and factor_dtype != "int8"
    kind = LinearKind(
        scheme=scheme,
        rank=32 if has_groups and form == "single-factor" else draw(st.integers(1, 7)),
        form=form,
        factor_dtype=factor_dtype,
        has_bias=draw(st.booleans()),
        has_input_scale=draw(st.booleans()),
        has_channel_order=draw(st.booleans()),
        rotation_block=draw(st.sampled_from((0, 2, 16))),
        activations=draw(st.sampled_from(ACTIVATIONS)),
    )
    rows = 32 * draw(st.integers(1, 2)) if has_groups and form == "two-factor" else draw(st.integers(1, 19))
    return kind, rows, draw(st.integers(1, 3)) * (96 if scheme.group_size in {-1, 96} else 2 * scheme.group_size)


def factor_parts(factor: Factor | None, name: str) -> dict[str, Tensor | None]:
    if isinstance(factor, QuantizedWeight):
        assert factor.zero_point is None
        return {f"{name} codes": factor.codes, f"{name} scale": factor.scale}
    return {name: factor}


def parts(weights: LinearWeights) -> dict[str, Tensor | None]:
    quantized, correction = weights.quantized, weights.correction
    factors = (None, None) if correction is None else (correction.lora_up, correction.lora_down)
    return {
        "codes": quantized.codes,
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        **factor_parts(factors[0], "lora_up"),
        **factor_parts(factors[1], "lora_down"),
        "input_scale": weights.input_scale,
        "channel_order": weights.channel_order,
        "bias": weights.bias,
    }


def assert_same(found: LinearWeights, wanted: LinearWeights) -> None:
    assert found.quantized.scheme == wanted.quantized.scheme
    assert (found.rotation_block, found.activations) == (wanted.rotation_block, wanted.activations)
    assert parts(found).keys() == parts(wanted).keys()
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


def assert_survives(file: Path, weights: LinearWeights) -> None:
    write_shard(file, encode_linear("proj", weights))
    with Shard(file) as shard:
        assert_same(decode_linear("proj", LinearRecord.of(weights, 0.1), shard.read), weights)


@settings(max_examples=100, deadline=None)
@given(case=kinds(), seed=st.integers(0, 2**31))
def test_every_kind_of_linear_layer_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[LinearKind, int, int], seed: int
) -> None:
    kind, rows, columns = case
    weights = random_linear(rows, columns, kind, torch.Generator().manual_seed(seed))
    assert_survives(tmp_path_factory.mktemp("shard") / "layer.safetensors", weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_format_survives_beside_every_type_of_factor(
    tmp_path: Path, scheme: QuantScheme, factor_dtype: FactorDtype, form: LoraForm
) -> None:
    kind = LinearKind(scheme=scheme, rank=32, form=form, factor_dtype=factor_dtype)
    weights = random_linear(64, 96, kind, torch.Generator().manual_seed(5))
    assert_survives(tmp_path / "layer.safetensors", weights)


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


@pytest.mark.parametrize("scheme", EXPONENTS, ids=str)
def test_powers_of_two_are_stored_as_exponents(tmp_path: Path, scheme: QuantScheme) -> None:
    kind = LinearKind(scheme=scheme, form="two-factor", factor_dtype="mxint6", rank=3)
    weights = random_linear(32, 64, kind, torch.Generator().manual_seed(1))
    scale = weights.quantized.scale
    scale[0, 0], scale[0, 1] = 2.0**-126, 2.0**127
    write_shard(tmp_path / "layer.safetensors", encode_linear("proj", weights))
    correction = weights.correction
    assert correction is not None and isinstance(correction.lora_up, QuantizedWeight)
    assert isinstance(correction.lora_down, QuantizedWeight)
    with safe_open(tmp_path / "layer.safetensors", "pt") as library:
        stored = library.get_tensor("proj.weight_scale")
        assert stored.dtype == torch.uint8
        assert [[2.0 ** (e - 127) for e in row] for row in stored.tolist()] == scale.tolist()
        for name, factor in (("lora_up", correction.lora_up), ("lora_down", correction.lora_down)):
            exponents, packed = (library.get_tensor(f"proj.{name}_{part}") for part in ("scale", "packed"))
            assert [[2.0 ** (e - 127) for e in row] for row in exponents.tolist()] == factor.scale.tolist()
            assert [bits_of(row, 6, factor.in_features) for row in packed] == factor.codes.tolist()
        assert library.get_tensor("proj.lora_up_packed").shape == (3, 24)


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


def test_rotation_and_activations_are_kept_per_layer(tmp_path: Path) -> None:
    model = tiny_model(LinearKind(rotation_block=16, activations=ActivationScheme(4, 32)))
    write_artifact(tmp_path / "art", model)
    with ArtifactReader.open(tmp_path / "art") as reader:
        for path, weights in model.linears.items():
            assert_same(reader.linear(path), weights)


def test_a_report_is_listed_and_is_no_file_of_the_tokenizer(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "art", report=lambda _manifest: b"<html>how it went</html>")
    assert (tmp_path / "art" / "report.html").read_bytes() == b"<html>how it went</html>"
    assert manifest.files["report.html"].num_bytes == 24
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert reader.tokenizer_files == TOKENIZER_FILES
    assert "report.html" not in write_artifact(tmp_path / "other").files


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
        *(
            LinearKind(scheme=QuantScheme(num_bits=bits, group_size=size, is_symmetric=symmetric), form=form)
            for bits, size, symmetric, form in itertools.product((3, 4), (-1, 32), (True, False), FORMS)
        ),
        *(
            LinearKind(scheme=scheme, form=form, factor_dtype=factor_dtype, rank=32)
            for scheme, factor_dtype, form in zip(itertools.cycle(EXPONENTS), FACTOR_DTYPES, itertools.cycle(FORMS[1:]))
        ),
        LinearKind(scheme=QuantScheme(4, 32, format="nf4"), factor_dtype="int8"),
    ],
    ids=str,
)
def test_effective_bits_are_the_bits_that_the_files_really_take(tmp_path: Path, kind: LinearKind) -> None:
    # as wide as groups of factors are
    manifest = write_artifact(tmp_path / "art", tiny_model(kind, num_key_value_heads=2))
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
    build = BuildConfig(
        scheme=QuantScheme(4, 32, format="mxint", exponent="ceil"),
        activations=ActivationScheme(4, 32),
        quantizer=QuantizerConfig("gptq", use_clip_search=True),
        reconstruct=ReconstructConfig("srr", 16, "int8", refit=True, options={"split": 4}),
        transform=TransformConfig(rotation="online", rotation_block=16),
        objective="output",
        budget=BudgetConfig(4.25, (3, 4)),
        layers={"model.layers.0.mlp.down_proj": LayerConfig(num_bits=8)},
    )
    manifest = write_artifact(tmp_path / "art", model, build=build)
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert reader.manifest.build == manifest.build == build
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
