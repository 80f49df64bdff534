"""What cannot be stored is never written, and the tensor is named; what can be stored is, whatever its layout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.artifact.reader import ArtifactReader
from models.artifact.record import LinearRecord
from models.artifact.writer import ArtifactWriter
from models.errors import ArtifactError
from models.scheme import ActivationScheme, QuantScheme
from models.types import Correction, LinearWeights, QuantizedWeight
from tests.support.artifact_builder import (
    LinearKind,
    TinyModel,
    finish,
    open_writer,
    records_of,
    tiny_model,
    write_artifact,
    write_layer,
)

NUM_LAYERS = 4
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model() -> TinyModel:
    return tiny_model(num_hidden_layers=NUM_LAYERS)


def interrupted(directory: Path, model: TinyModel, num_layers: int, fingerprint: str = "build") -> Path:
    """A build that ended after ``num_layers`` layers; its partial directory."""
    writer = open_writer(directory, model, fingerprint)
    for layer_index in range(num_layers):
        write_layer(writer, model, layer_index)
    return directory.with_name(f"{directory.name}.partial")


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_is_missing_at_the_end_is_named(tmp_path: Path, model: TinyModel) -> None:
    writer = open_writer(tmp_path / "art", model)
    for layer_index in (0, 1, 3):
        write_layer(writer, model, layer_index)
    with pytest.raises(ArtifactError, match="decoder layer 2 is not written"):
        finish(writer, model)
    with pytest.raises(ArtifactError, match="cannot be finished"):
        finish(open_writer(tmp_path / "other", model), model)
    assert not (tmp_path / "art").exists()


def spoiled(weights: LinearWeights, **changes: Any) -> LinearWeights:
    """``weights`` with parts of its quantized weight replaced."""
    return replace(weights, quantized=replace(weights.quantized, **changes))


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return tensor.clone().index_put_(
        tuple(torch.tensor(0) for _ in tensor.shape), torch.tensor(value, dtype=tensor.dtype)
    )


def mx_weight(scale: torch.Tensor) -> QuantizedWeight:
    return QuantizedWeight(torch.zeros(32, 32, dtype=torch.uint8), scale, None, QuantScheme(4, 32, format="mxint"))


def factors_with(codes: int = 0, scale: float = 1) -> Correction:
    """Quantized factors of rank 4 whose lora_up has ``codes`` and ``scale`` everywhere."""
    scheme = QuantScheme(4, 32, is_symmetric=True)
    up = QuantizedWeight(
        torch.full((4, 32), codes, dtype=torch.uint8), torch.full((4, 1), scale, dtype=torch.float16), None, scheme
    )
    down = QuantizedWeight(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1).half(), None, scheme)
    return Correction(up, down)


UNSTORABLE: dict[str, tuple[Callable[[LinearWeights], LinearWeights], str]] = {
    "a code beyond its bits": (lambda w: spoiled(w, codes=with_value(w.quantized.codes, 16)), "weight_packed"),
    "codes of another type": (lambda w: spoiled(w, codes=w.quantized.codes.int()), "weight_packed"),
    "a scale of zero": (lambda w: spoiled(w, scale=with_value(w.quantized.scale, 0)), "weight_scale"),
    "an infinite scale": (lambda w: spoiled(w, scale=with_value(w.quantized.scale, float("inf"))), "weight_scale"),
    "a scale in float32": (lambda w: spoiled(w, scale=w.quantized.scale.float()), "weight_scale"),
    "a scale in float64": (lambda w: spoiled(w, scale=w.quantized.scale.double()), "weight_scale"),
    "a scale too few": (lambda w: spoiled(w, scale=w.quantized.scale[:-1]), "weight_scale"),
    "no zero point": (lambda w: spoiled(w, zero_point=None), "weight_zero_point"),
    "a scale that is no power of two": (
        lambda w: replace(w, quantized=mx_weight(torch.full((32, 1), 3.0, dtype=torch.bfloat16))),
        "weight_scale",
    ),
    "a power of two that is too small": (
        lambda w: replace(w, quantized=mx_weight(torch.full((32, 1), 2.0**-130, dtype=torch.bfloat16))),
        "weight_scale",
    ),
    "powers of two in float32": (lambda w: replace(w, quantized=mx_weight(torch.ones(32, 1))), "weight_scale"),
    "a code of a factor beyond its bits": (lambda w: replace(w, correction=factors_with(codes=16)), "lora_up_packed"),
    "a scale of zero in a factor": (lambda w: replace(w, correction=factors_with(scale=0)), "lora_up_scale"),
    "an input scale of zero": (lambda w: replace(w, input_scale=torch.zeros(32)), "input_scale"),
    "an order with a channel twice": (
        lambda w: replace(w, channel_order=torch.zeros(32, dtype=torch.int32)),
        "channel_order",
    ),
    "an order in int64": (lambda w: replace(w, channel_order=torch.arange(32)), "channel_order"),
    "a bias that is not finite": (lambda w: replace(w, bias=torch.full((32,), float("nan"))), "bias"),
    "a bias of another length": (lambda w: replace(w, bias=torch.zeros(31)), "bias"),
    "a factor that is not finite": (
        lambda w: replace(w, correction=Correction(torch.full((32, 4), float("inf")), torch.zeros(4, 32))),
        "lora_up",
    ),
    "factors of two ranks": (
        lambda w: replace(w, correction=Correction(torch.zeros(32, 4), torch.zeros(3, 32))),
        "lora_down",
    ),
}


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_what_the_format_cannot_hold_names_the_tensor_and_leaves_no_layer(
    tmp_path: Path, model: TinyModel, kind: str
) -> None:
    spoil, tensor = UNSTORABLE[kind]
    linears = model.layer_linears(0) | {PATH: spoil(model.linears[PATH])}
    writer = open_writer(tmp_path / "art", model)
    with pytest.raises(ArtifactError, match=f"decoder layer 0: tensor {PATH}.{tensor}: "):
        writer.write_layer(0, linears, model.layer_tensors(0), records_of(linears))
    assert writer.finished_layers() == 0


def test_a_layer_that_lacks_something_is_refused(tmp_path: Path, model: TinyModel) -> None:
    writer = open_writer(tmp_path / "art", model)
    linears, tensors = model.layer_linears(0), model.layer_tensors(0)
    records = records_of(linears)
    norm = "model.layers.0.input_layernorm.weight"

    def without(values: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != name}

    for arguments, named in (
        ((without(linears, PATH), tensors, records), f"{PATH}.lora_down"),
        ((linears, without(tensors, norm), records), norm),
        ((linears, tensors, without(records, PATH)), PATH),
        ((linears, {**tensors, "model.norm.weight": torch.ones(32)}, records), "model.norm.weight"),
        ((linears, {**tensors, norm: torch.full((32,), float("nan"))}, records), norm),
        ((linears, tensors, {**records, PATH: records["model.layers.0.self_attn.k_proj"]}), PATH),
    ):
        with pytest.raises(ArtifactError, match=named):
            writer.write_layer(0, *arguments)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        writer.write_rest(without(model.rest(), "model.norm.weight"))


def test_a_network_with_biases_needs_them_stored(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    linears = model.layer_linears(0) | {PATH: replace(model.linears[PATH], bias=None)}
    with pytest.raises(ArtifactError, match=f"{PATH}.*bias"):
        open_writer(tmp_path / "art", model).write_layer(0, linears, model.layer_tensors(0), records_of(linears))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer_files": {"tokenizer.bin": b""}}, "tokenizer.bin"),
        ({"tokenizer_files": {"config.json": b""}}, "config.json"),
        ({"tokenizer_files": {"report.html": b""}}, "report.html"),
        ({"tokenizer_files": {"x.safetensors": b""}}, "x.safetensors"),
        ({"tokenizer_files": {"../tokenizer.json": b""}}, "../tokenizer.json"),
        ({"tokenizer_files": {"": b""}}, "tokenizer file ''"),
        ({"hf_config": {"architectures": float("nan")}}, "config.json"),
        ({"generation_config": {"x": object()}}, "generation_config.json"),
        ({"evaluation": {"quantized_perplexity": float("inf")}}, "quantized_perplexity is inf"),
    ],
)
def test_what_cannot_be_part_of_an_artifact_is_named_and_nothing_is_published(
    tmp_path: Path, model: TinyModel, changes: dict[str, Any], named: str
) -> None:
    interrupted(tmp_path / "art", model, NUM_LAYERS)
    with pytest.raises(ArtifactError) as caught:
        finish(open_writer(tmp_path / "art", model), model, **changes)
    assert named in str(caught.value)
    assert not (tmp_path / "art").exists()
    assert not (tmp_path / "art.partial" / "tokenizer.json").exists()
    finish(open_writer(tmp_path / "art", model), model)


def test_a_configuration_of_another_network_is_found_before_the_artifact_gets_its_name(
    tmp_path: Path, model: TinyModel
) -> None:
    interrupted(tmp_path / "art", model, NUM_LAYERS)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        finish(open_writer(tmp_path / "art", model), model, hf_config={**model.hf_config, "num_hidden_layers": 3})
    assert not (tmp_path / "art").exists()


def test_tensors_of_any_layout_are_stored_by_value(tmp_path: Path) -> None:
    model = tiny_model()
    weights = model.linears[PATH]
    assert weights.correction is not None
    strided = replace(
        weights,
        quantized=replace(weights.quantized, codes=weights.quantized.codes.T.contiguous().T),
        correction=Correction(weights.correction.lora_up.T.contiguous().T, weights.correction.lora_down),
    )
    write_artifact(tmp_path / "plain", model)
    write_artifact(tmp_path / "strided", TinyModel(model.hf_config, model.linears | {PATH: strided}, model.tensors))
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "strided")


def test_a_correction_of_rank_zero_is_stored_as_none(tmp_path: Path) -> None:
    model = tiny_model(LinearKind(form="none"))
    weights = model.linears[PATH]
    empty = replace(weights, correction=Correction(torch.zeros(32, 0), torch.zeros(0, 32)))
    write_artifact(tmp_path / "art", TinyModel(model.hf_config, model.linears | {PATH: empty}, model.tensors))
    with ArtifactReader.open(tmp_path / "art") as reader:
        assert reader.linear(PATH).correction is None
        assert reader.manifest.linears[PATH].effective_bits == weights.effective_bits


def test_a_record_refuses_what_it_cannot_say(model: TinyModel) -> None:
    weights = model.linears[PATH]
    with pytest.raises(ArtifactError, match="relative_output_error"):
        LinearRecord.of(weights, 0.1, float("nan"))
    with pytest.raises(ArtifactError, match="relative_weight_error"):
        LinearRecord.of(weights, -0.1)
    mixed = replace(weights, correction=Correction(torch.zeros(32, 4), torch.zeros(4, 32).half()))
    with pytest.raises(ArtifactError, match=r"float16.*float32"):
        LinearRecord.of(mixed, 0.1)
    half_quantized = replace(weights, correction=Correction(factors_with().lora_up, torch.zeros(4, 32)))
    with pytest.raises(ArtifactError, match=r"float32.*int4"):
        LinearRecord.of(half_quantized, 0.1)
    other_grid = replace(weights, correction=Correction(weights.quantized, None))
    with pytest.raises(ArtifactError, match=r"INT4 asymmetric.*give both one of"):
        LinearRecord.of(other_grid, 0.1)
    with pytest.raises(ArtifactError, match="rotation_block 24 does not divide 32"):
        LinearRecord.of(replace(weights, rotation_block=24), 0.1)
    with pytest.raises(ArtifactError, match="group_size 64 does not divide its 32 input channels"):
        LinearRecord.of(replace(weights, activations=ActivationScheme(4, 64)), 0.1)
    with pytest.raises(ArtifactError, match="float64"):
        LinearRecord.of(replace(weights, correction=Correction(torch.zeros(32, 4).double(), None)), 0.1)


def test_a_writer_for_a_relative_path_survives_a_change_of_directory(
    tmp_path: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = ArtifactWriter(Path("art"), model.config, "build")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for layer_index in range(NUM_LAYERS):
        write_layer(writer, model, layer_index)
    finish(writer, model)
    ArtifactReader.open(tmp_path / "art").close()
