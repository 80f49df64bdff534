"""Quantized embedding and output head: what may be asked for, what is stored, and the logits that come of it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.artifact.record import LinearRecord
from models.artifact.writer import ArtifactWriter
from models.config import BuildConfig
from models.errors import ArtifactError, KernelError, SchemeError
from models.kernels import reference
from models.kernels.reference import ReferenceBackend
from models.layers.linear import LowRankLinear
from models.llama.batch import Batch
from models.llama.model import LlamaForCausalLM
from models.quant.grid import dequantize
from models.scheme import EMBEDDING, HEAD, QuantScheme, VocabularyScheme
from models.types import LinearWeights, QuantizedWeight
from tests.support.artifact_builder import (
    TinyModel,
    finish,
    random_codes,
    records_of,
    refusal,
    sign_again,
    tiny_model,
    write_artifact,
    write_layer,
)
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

TOKENS = [5, 17, 301, 42, 42, 8, 119, 260]
LAST_SHARD = "model-00003-of-00003.safetensors"
CASES = [
    (head_bits, embedding_bits, is_tied)
    for head_bits in (16, 8, 4)
    for embedding_bits in (16, 8)
    for is_tied in (False, True)
    if (head_bits, embedding_bits) not in {(16, 16), (16, 8)} or (embedding_bits == 8 and not is_tied)
]


def write_quantized(
    directory: Path, scheme: VocabularyScheme, *, is_tied: bool
) -> tuple[TinyModel, dict[str, LinearWeights]]:
    """An artifact with random codes for what ``scheme`` quantizes; the model without the tensors that these replace."""
    model = tiny_model(vocab_size=VOCAB_SIZE, tie_word_embeddings=is_tied)
    config = model.config.with_vocabulary(scheme)
    generator = torch.Generator().manual_seed(7)
    vocabulary = {
        path: LinearWeights(
            random_codes(VOCAB_SIZE, config.hidden_size, scheme.scheme(path, config.hidden_size), generator)
        )
        for path in config.vocabulary
    }
    kept = {name: tensor for name, tensor in model.tensors.items() if name in config.unquantized_shapes()}
    model = replace(model, tensors=kept)
    writer = ArtifactWriter(directory, config, "build")
    for layer_index in range(config.num_hidden_layers):
        write_layer(writer, model, layer_index)
    writer.write_rest(model.rest(), vocabulary, records_of(vocabulary))
    finish(writer, model, build=BuildConfig(vocabulary=scheme), tokenizer_files=tokenizer_files())
    return model, vocabulary


def by_hand(quantized: QuantizedWeight) -> Tensor:
    """``scale * (code - zero)`` in float64, with an index per value."""
    codes, scale = quantized.codes, quantized.scale.double()
    groups = torch.arange(codes.shape[1]) * scale.shape[1] // codes.shape[1]
    return scale[:, groups] * (codes.double() - 2 ** (quantized.scheme.num_bits - 1))


@torch.inference_mode()
def logits_of(network: LlamaForCausalLM) -> Tensor:
    return network.logits(network(Batch.uncached([TOKENS])))


def dense_twin(directory: Path, model: TinyModel, vocabulary: dict[str, LinearWeights], *, is_tied: bool) -> Tensor:
    """Logits of an artifact with an untied head whose embedding and head are the dequantized ones in float32."""
    tensors = dict(model.tensors)
    for path, weights in vocabulary.items():
        tensors[f"{path}.weight"] = by_hand(weights.quantized).float()
    if is_tied and f"{HEAD}.weight" not in tensors:
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
    hf_config = {**model.hf_config, "tie_word_embeddings": False}
    write_artifact(directory, TinyModel(hf_config, model.linears, tensors), tokenizer_files=tokenizer_files())
    return logits_of(load_artifact(directory, dtype=torch.float32, backend="reference").model)


@pytest.mark.parametrize(("head_bits", "embedding_bits", "is_tied"), CASES)
@pytest.mark.parametrize("backend", ["reference", "dequantized"])
def test_logits_are_those_of_the_dequantized_matrices(
    tmp_path: Path, head_bits: int, embedding_bits: int, is_tied: bool, backend: str
) -> None:
    model, vocabulary = write_quantized(tmp_path / "a", VocabularyScheme(head_bits, embedding_bits), is_tied=is_tied)
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32, backend=backend)
    logits = logits_of(loaded.model)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, dense_twin(tmp_path / "b", model, vocabulary, is_tied=is_tied), rtol=1e-4, atol=1e-4
    )
    head = vocabulary.get(HEAD) or (vocabulary.get(EMBEDDING) if is_tied else None)
    if head is not None:
        with torch.inference_mode():
            hidden = loaded.model(Batch.uncached([TOKENS]))
            expected = hidden.double() @ by_hand(head.quantized).T
        torch.testing.assert_close(loaded.model.logits(hidden).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("head_bits", "embedding_bits", "is_tied"), CASES)
def test_what_is_written_is_what_is_read(tmp_path: Path, head_bits: int, embedding_bits: int, is_tied: bool) -> None:
    model, vocabulary = write_quantized(tmp_path / "a", VocabularyScheme(head_bits, embedding_bits), is_tied=is_tied)
    with ArtifactReader.open(tmp_path / "a") as reader:
        assert reader.manifest.vocabulary.keys() == vocabulary.keys()
        for path, weights in vocabulary.items():
            read = reader.linear(path)
            assert torch.equal(read.quantized.codes, weights.quantized.codes)
            assert torch.equal(read.quantized.scale, weights.quantized.scale)
            assert read == replace(read, correction=None, bias=None, activations=None, input_scale=None)
        for name, tensor in model.rest().items():
            assert torch.equal(reader.tensor(name), tensor)
        manifest = reader.manifest
    sizes = {path: weights.quantized.num_stored_bits / 8 for path, weights in vocabulary.items()}
    stated = {EMBEDDING: manifest.component_bytes.get("embedding"), HEAD: manifest.component_bytes.get("head")}
    assert {path: size for path, size in stated.items() if size is not None} == sizes
    assert sum(manifest.component_bytes.values()) == sum(
        (tmp_path / "a" / name).stat().st_size - header(tmp_path / "a" / name) for name in manifest.shards
    )
    layers = tiny_model(vocab_size=VOCAB_SIZE).linears.values()
    bits = sum(it.effective_bits * it.quantized.codes.numel() for it in layers)
    assert manifest.effective_bits == pytest.approx(bits / sum(it.quantized.codes.numel() for it in layers))


def header(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_a_tied_head_of_eight_bits_is_the_embedding_on_disk_and_in_memory(tmp_path: Path) -> None:
    write_quantized(tmp_path / "a", VocabularyScheme(8, 8), is_tied=True)
    with ArtifactReader.open(tmp_path / "a") as reader:
        assert not [name for name in reader.manifest.tensors if name.startswith(HEAD)]
        assert torch.equal(reader.linear(HEAD).quantized.codes, reader.linear(EMBEDDING).quantized.codes)
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference")
    assert loaded.model.lm_head is loaded.model.embed_tokens
    assert "embedding" not in loaded.resident_bytes
    assert loaded.selections[HEAD].backend.name == "reference"
    apart = load_artifact(tmp_path / "a", dtype=torch.float32, backend="dequantized")
    assert apart.model.lm_head is not apart.model.embed_tokens
    assert apart.resident_bytes["embedding"] == apart.manifest.component_bytes["embedding"]


def test_backends_of_the_head_agree_in_bfloat16(tmp_path: Path) -> None:
    for head_bits in (8, 4):
        write_quantized(tmp_path / str(head_bits), VocabularyScheme(head_bits, 8), is_tied=False)
        wanted = logits_of(load_artifact(tmp_path / str(head_bits), dtype=torch.float32, backend="reference").model)
        for backend in ("auto", "reference"):
            loaded = load_artifact(tmp_path / str(head_bits), dtype=torch.bfloat16, backend=backend)
            assert (logits_of(loaded.model) - wanted).abs().max() < 16 * 2**-8 * wanted.abs().max()
        assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize("tensor", ["lm_head.weight_packed", "lm_head.weight_scale", "model.embed_tokens.weight_scale"])
def test_a_missing_or_damaged_tensor_is_named(tmp_path: Path, tensor: str) -> None:
    write_quantized(tmp_path / "a", VocabularyScheme(4, 8), is_tied=True)
    manifest = (tmp_path / "a" / "quantization.json").read_bytes()
    sign_again(tmp_path / "a", lambda values: values["tensors"].pop(tensor))
    assert f"tensor {tensor}: this tensor is missing" in refusal(tmp_path / "a")
    (tmp_path / "a" / "quantization.json").write_bytes(manifest)
    shard = tmp_path / "a" / LAST_SHARD
    data = bytearray(shard.read_bytes())
    entry = json.loads(data[8 : header(shard)])[tensor]
    data[header(shard) + entry["data_offsets"][0]] ^= 1
    shard.write_bytes(data)
    assert f"{LAST_SHARD}: tensor {tensor}: its bytes do not match" in refusal(tmp_path / "a")


@pytest.mark.parametrize(("path", "value"), [(HEAD, 0.0), (EMBEDDING, float("nan")), (HEAD, -1.0)])
def test_a_scale_that_cannot_be_is_found_though_every_hash_is_right(tmp_path: Path, path: str, value: float) -> None:
    write_quantized(tmp_path / "a", VocabularyScheme(4, 8), is_tied=False)
    shard, name = tmp_path / "a" / LAST_SHARD, f"{path}.weight_scale"
    data = bytearray(shard.read_bytes())
    start = header(shard) + json.loads(data[8 : header(shard)])[name]["data_offsets"][0]
    data[start : start + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    shard.write_bytes(data)
    sign_again(tmp_path / "a")
    with ArtifactReader.open(tmp_path / "a", "structure") as reader, pytest.raises(ArtifactError, match=name):
        reader.linear(path)


def change_record(path: str, **changes: Any) -> Any:
    return lambda values: values["vocabulary"][path].update(changes)


LIES = {
    "a record too few": (lambda values: values["vocabulary"].pop(HEAD), "tensor lm_head: this record is missing"),
    "a build without": (lambda values: values["build"].pop("vocabulary"), "does not belong here"),
    "a build that cannot be": (
        lambda values: values["build"]["vocabulary"].update(head_bits=16),
        "the head is tied to the embedding",
    ),
    "another width": (change_record(EMBEDDING, in_features=64), "recorded as a (320, 64) matrix"),
    "more rows": (change_record(HEAD, out_features=321), "recorded as a (321, 32) matrix"),
    "a rotation": (change_record(HEAD, rotation_block=16), "lm_head: recorded with a rotation"),
    "a bias": (change_record(EMBEDDING, has_bias=True), "model.embed_tokens: recorded with a bias"),
    "other bits": (change_record(HEAD, effective_bits=3.0), "lm_head: effective_bits 3.0"),
    "other sums": (lambda values: values["component_bytes"].update(head=1), "component_bytes"),
    "a missing sum": (lambda values: values["component_bytes"].pop("embedding"), "component_bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, lie: str) -> None:
    write_quantized(tmp_path / "a", VocabularyScheme(4, 8), is_tied=True)
    change, problem = LIES[lie]
    sign_again(tmp_path / "a", change)
    assert problem in refusal(tmp_path / "a")


def test_an_artifact_from_before_is_read_as_it_is(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    write_artifact(tmp_path / "a", model, tokenizer_files=tokenizer_files())
    before = logits_of(load_artifact(tmp_path / "a", dtype=torch.float32).model)

    def age(values: dict[str, Any]) -> None:
        del values["vocabulary"], values["build"]["vocabulary"]
        assert values["component_bytes"].keys() == {
            "packed", "scale", "zero_point", "lora_up", "lora_down", "unquantized"
        }  # fmt: skip

    sign_again(tmp_path / "a", age)
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits_of(loaded.model), before)
    assert loaded.manifest.build.vocabulary == VocabularyScheme()
    with ArtifactReader.open(tmp_path / "a") as reader, pytest.raises(ArtifactError, match="no linear layer 'lm_head'"):
        reader.linear(HEAD)


def test_codes_for_what_is_not_quantized_are_not_written(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    weights = LinearWeights(
        random_codes(VOCAB_SIZE, 32, QuantScheme(8, 32, is_symmetric=True), torch.Generator().manual_seed(0))
    )
    writer = ArtifactWriter(tmp_path / "a", model.config, "build")
    with pytest.raises(ArtifactError, match="lm_head"):
        writer.write_rest(model.rest(), {HEAD: weights}, {HEAD: LinearRecord.of(weights, 0.1)})
    assert not writer.has_rest()
    with pytest.raises(ArtifactError, match="not finished"):
        writer.read_vocabulary()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"head_bits": 5}, "head_bits is 5; choose 16, 8 or 4"),
        ({"embedding_bits": 4}, "embedding_bits is 4; choose 16 or 8"),
        ({"head_bits": "8"}, "head_bits"),
        ({"bits": 8}, "bits"),
    ],
)
def test_what_cannot_be_asked_for_is_said(values: dict[str, object], problem: str) -> None:
    with pytest.raises(SchemeError, match=problem):
        BuildConfig.from_dict({"vocabulary": values})


def test_which_matrices_are_stored_as_codes() -> None:
    found = {
        (head, embedding, is_tied): VocabularyScheme(head, embedding).quantized(is_tied=is_tied)
        for head, embedding, is_tied in [*CASES, (16, 16, True), (16, 16, False)]
    }
    assert found == {
        (16, 16, True): (),
        (16, 16, False): (),
        (16, 8, False): (EMBEDDING,),
        (8, 16, False): (HEAD,),
        (8, 16, True): (HEAD,),
        (4, 16, False): (HEAD,),
        (4, 16, True): (HEAD,),
        (8, 8, False): (EMBEDDING, HEAD),
        (8, 8, True): (EMBEDDING,),
        (4, 8, False): (EMBEDDING, HEAD),
        (4, 8, True): (EMBEDDING, HEAD),
    }
    with pytest.raises(SchemeError, match="tied"):
        VocabularyScheme(16, 8).quantized(is_tied=True)


@pytest.mark.parametrize(("hidden_size", "group_size"), [(576, 64), (96, 32), (48, -1)])
def test_groups_tile_the_hidden_state(hidden_size: int, group_size: int) -> None:
    assert VocabularyScheme(4).scheme(HEAD, hidden_size) == QuantScheme(4, group_size, is_symmetric=True)


@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_the_reference_backend_takes_large_matrices_apart_and_gives_single_rows(
    monkeypatch: pytest.MonkeyPatch, num_bits: int
) -> None:
    quantized = random_codes(50, 64, QuantScheme(num_bits, 32), torch.Generator().manual_seed(1))
    layer = LowRankLinear.of(
        LinearWeights(quantized), [ReferenceBackend()], device=torch.device("cpu"), dtype=torch.float32, where="here"
    )
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ dequantize(quantized).double().T
    monkeypatch.setattr(reference, "_WEIGHTS_AT_ONCE", 64 * 7)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    indices = torch.tensor([49, 0, 7, 7])
    assert torch.equal(layer.rows(indices), dequantize(quantized)[indices])


def test_a_backend_without_rows_says_so() -> None:
    quantized = random_codes(32, 64, QuantScheme(8, -1, is_symmetric=True), torch.Generator().manual_seed(1))
    weights, cpu = LinearWeights(quantized), torch.device("cpu")
    layer = LowRankLinear.of(weights, [_Rowless()], device=cpu, dtype=torch.float32, where="here")
    assert not layer.has_rows
    with pytest.raises(KernelError, match="does not give single rows"):
        layer.rows(torch.tensor([0]))


class _Rowless(ReferenceBackend):
    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Any:
        return partial(super().prepare(weights, device, dtype))
