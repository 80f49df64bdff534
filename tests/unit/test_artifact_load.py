"""From an artifact to a network: the same numbers as transformers, one copy in memory, no file left open."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as HfLlamaConfig
from transformers import LlamaForCausalLM as HfLlama

from models.artifact.load import ArtifactWeights, load_artifact
from models.artifact.reader import ArtifactReader
from models.device import default_dtype
from models.errors import ArtifactError, KernelError
from models.kernels import get_backends
from models.llama.batch import Batch
from models.llama.model import LlamaForCausalLM
from models.scheme import ActivationScheme, QuantScheme
from models.types import LinearWeights
from tests.support.artifact_builder import LinearKind, TinyModel, tiny_model, write_artifact
from tests.support.linear_oracle import expected_output
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

TOKENS = [5, 17, 301, 42, 42, 8, 119, 260]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, bytes]:
    return tokenizer_files()


def model_of(kind: LinearKind | None = None, **changes: Any) -> TinyModel:
    return tiny_model(kind, vocab_size=VOCAB_SIZE, **changes)


def merged(weights: LinearWeights) -> Tensor:
    """One dense matrix that does what the layer does, in float64: its outputs for every unit input."""
    in_features = weights.quantized.in_features
    return expected_output(replace(weights, bias=None), torch.eye(in_features)).value.T


def reference_logits(model: TinyModel) -> Tensor:
    """Logits of transformers' own network over the merged weights, in float64."""
    network = HfLlama(HfLlamaConfig(**{name: v for name, v in model.hf_config.items() if name != "architectures"}))
    state = {name: tensor.double() for name, tensor in model.tensors.items()}
    for path, weights in model.linears.items():
        state[f"{path}.weight"] = merged(weights)
        if weights.bias is not None:
            state[f"{path}.bias"] = weights.bias.double()
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.double().load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits: Tensor = network(torch.tensor([TOKENS])).logits[0]
    return logits


@torch.inference_mode()
def logits_of(network: LlamaForCausalLM) -> Tensor:
    return network.logits(network(Batch.uncached([TOKENS])))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LinearKind(), {}),
        (LinearKind(scheme=QuantScheme(num_bits=3, group_size=-1, is_symmetric=True), form="none"), {}),
        (LinearKind(scheme=QuantScheme(num_bits=8, group_size=32), factor_dtype="float32"), {}),
        (LinearKind(scheme=QuantScheme(4, 32, format="mxint", exponent="ceil"), factor_dtype="int8"), {}),
        (LinearKind(scheme=QuantScheme(4, 32, format="mxfp4"), factor_dtype="int4"), {"num_key_value_heads": 2}),
        (LinearKind(scheme=QuantScheme(4, 32, format="nf4"), rank=32, form="single-factor", factor_dtype="mxint8"), {}),
        (LinearKind(has_input_scale=True, has_channel_order=True, rotation_block=16), {}),
        (LinearKind(), {"tie_word_embeddings": True}),
        (LinearKind(), {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_a_loaded_network_gives_the_logits_of_transformers_over_the_merged_weights(
    tmp_path: Path, tokenizer: dict[str, bytes], kind: LinearKind, changes: dict[str, Any]
) -> None:
    model = model_of(kind, **changes)
    write_artifact(tmp_path / "art", model, tokenizer_files=tokenizer)
    loaded = load_artifact(tmp_path / "art", dtype=torch.float32, backend="reference")
    torch.testing.assert_close(logits_of(loaded.model).double(), reference_logits(model), atol=1e-4, rtol=1e-4)


def test_activations_are_quantized_where_a_layer_says_so(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    logits = []
    for activations in (None, ActivationScheme(8, is_symmetric=True), ActivationScheme(4, 32)):
        model = model_of(LinearKind(activations=activations))
        directory = tmp_path / str(len(logits))
        write_artifact(directory, model, tokenizer_files=tokenizer)
        logits.append(logits_of(load_artifact(directory, dtype=torch.float32, backend="reference").model))
    dense, eight_bits, four_bits = logits
    # finer grids come closer, and no grid leaves everything as it is
    assert 0 < float((eight_bits - dense).norm()) < float((four_bits - dense).norm()) / 4
    assert float((eight_bits - dense).norm()) < 0.05 * float(dense.norm())


def test_the_default_backends_agree_with_the_reference_in_bfloat16(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    model = model_of()
    write_artifact(tmp_path / "art", model, tokenizer_files=tokenizer)
    loaded = load_artifact(tmp_path / "art", dtype=torch.bfloat16)
    wanted = reference_logits(model)
    # bfloat16 keeps 8 bits: a few rounding steps of the largest logit, through two layers
    assert (logits_of(loaded.model).double() - wanted).abs().max() < 16 * 2**-8 * wanted.abs().max()


def test_dtypes_devices_and_sizes_are_those_that_were_asked_for(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    manifest = write_artifact(tmp_path / "art", model_of(), tokenizer_files=tokenizer)
    loaded = load_artifact(tmp_path / "art", "cpu", torch.float32, backend="reference")
    assert loaded.manifest == manifest
    assert loaded.model.dtype == torch.float32
    assert loaded.model.embed_tokens.dtype == loaded.model.lm_head.dtype == torch.bfloat16
    assert loaded.selections.keys() == manifest.linears.keys()
    assert {selection.backend.name for selection in loaded.selections.values()} == {"reference"}
    assert loaded.weight_bytes == manifest.component_bytes
    assert loaded.load_seconds > 0
    sizes = Counter(unquantized=sum(parameter.nbytes for parameter in loaded.model.parameters()))
    for path in manifest.linears:
        sizes["reference"] += loaded.model.get_submodule(path.removeprefix("model.")).prepared.nbytes
    assert loaded.resident_bytes == sizes


def test_matrices_wider_than_the_activations_are_narrowed(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    model = model_of()
    wide = {name: tensor.float() for name, tensor in model.tensors.items()}
    write_artifact(tmp_path / "art", TinyModel(model.hf_config, model.linears, wide), tokenizer_files=tokenizer)
    for dtype in (torch.bfloat16, torch.float32):
        network = load_artifact(tmp_path / "art", dtype=dtype, backend="reference").model
        assert isinstance(network, LlamaForCausalLM)
        assert network.embed_tokens.dtype == dtype


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(tie_word_embeddings=True), tokenizer_files=tokenizer)
    network = load_artifact(tmp_path / "art", backend="reference").model
    assert isinstance(network, LlamaForCausalLM)
    assert network.lm_head is network.embed_tokens


def test_the_tokenizer_comes_from_the_artifact(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(), tokenizer_files=tokenizer)
    loaded = load_artifact(tmp_path / "art")
    text = "The river runs past the old mill"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.has_chat_template


class CountingReader(ArtifactReader):
    """Notes what is asked for."""

    asked: Counter[str]

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        self.asked[name] += 1
        return super().tensor(name, device)

    def linear(self, path: str, device: torch.device | str = "cpu") -> LinearWeights:
        self.asked[path] += 1
        return super().linear(path, device)


def test_every_tensor_is_read_once_and_layers_in_order(tmp_path: Path) -> None:
    model = model_of()
    write_artifact(tmp_path / "art", model)
    with CountingReader.open(tmp_path / "art") as reader:
        reader.asked = Counter()
        LlamaForCausalLM(reader.config, ArtifactWeights(reader, get_backends(), CPU, torch.float32))
        assert reader.asked == Counter([*model.tensors, *model.linears])
        layers = [name.split(".")[2] for name in reader.asked if name.startswith("model.layers.")]
        assert layers == sorted(layers)


def test_nothing_of_the_artifact_stays_open_or_mapped(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(), tokenizer_files=tokenizer)
    loaded = load_artifact(tmp_path / "art", dtype=torch.float32, backend="reference")
    before = logits_of(loaded.model)
    shutil.rmtree(tmp_path / "art")
    assert torch.equal(logits_of(loaded.model), before)
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in held if path.is_relative_to(tmp_path)]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_damaged_artifact_is_not_loaded(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(), tokenizer_files=tokenizer)
    shard = tmp_path / "art" / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model-00002-of-00003\.safetensors: tensor model\.layers\.1\."):
        load_artifact(tmp_path / "art")


def test_an_unknown_backend_is_refused(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(), tokenizer_files=tokenizer)
    with pytest.raises(KernelError, match="unknown"):
        load_artifact(tmp_path / "art", backend="abacus")


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"{}"}, {"tokenizer.json": b"\xff"}])
def test_an_artifact_without_a_usable_tokenizer_is_an_artifact_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    write_artifact(tmp_path / "art", model_of(), tokenizer_files=files)
    with pytest.raises(ArtifactError, match=str(tmp_path / "art")):
        load_artifact(tmp_path / "art")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ],
)
def test_the_cpu_runs_in_bfloat16_only_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert default_dtype(CPU) == (dtype if is_supported else torch.float32)


def test_other_devices_have_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_dtype(torch.device("cuda:1")) == torch.bfloat16
    assert default_dtype(torch.device("mps")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert default_dtype(CPU) == torch.float32
