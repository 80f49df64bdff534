"""Small artifacts with random content, and ways to tamper with them and sign the result again."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.artifact.format import Manifest
from models.artifact.jsonio import tabular_json
from models.artifact.reader import ArtifactReader
from models.artifact.record import LinearRecord, LoraForm
from models.artifact.writer import ArtifactWriter
from models.config import BuildConfig, FactorDtype
from models.errors import ArtifactError
from models.llama.config import LlamaConfig
from models.quant.factors import FACTOR_SCHEMES, FLOAT_FACTORS
from models.scheme import ActivationScheme, QuantScheme
from models.types import Correction, Factor, LinearWeights, QuantizedWeight

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 3]}
TOKENIZER_FILES = {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": b"{{ messages }}"}
EVALUATION = {"dense_perplexity": 23.94, "quantized_perplexity": 27.5, "num_tokens": 4096}


@dataclass(frozen=True)
class LinearKind:
    """What a random linear layer consists of."""

    scheme: QuantScheme = field(default_factory=lambda: QuantScheme(group_size=32))
    rank: int = 4
    form: LoraForm = "two-factor"
    factor_dtype: FactorDtype = "bfloat16"
    has_bias: bool = False
    has_input_scale: bool = False
    has_channel_order: bool = False
    rotation_block: int = 0
    activations: ActivationScheme | None = None


def random_codes(rows: int, columns: int, scheme: QuantScheme, generator: torch.Generator) -> QuantizedWeight:
    """A quantized matrix with every code, scale and zero point drawn at random."""
    groups = scheme.num_groups(columns)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, scheme.max_code + 1, shape, generator=generator).to(torch.uint8)

    if scheme.has_exponent_scale:
        scale = (2.0 ** torch.randint(-11, -5, (rows, groups), generator=generator)).to(torch.bfloat16)
    else:
        scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(torch.float16)
    zero_point = None if scheme.is_symmetric else codes(rows, groups)
    return QuantizedWeight(codes(rows, columns), scale, zero_point, scheme)


def random_correction(rows: int, columns: int, kind: LinearKind, generator: torch.Generator) -> Correction:
    """Low-rank factors of the type and form of ``kind``."""

    def factor(*shape: int) -> Factor:
        if kind.factor_dtype in FACTOR_SCHEMES:
            return random_codes(*shape, FACTOR_SCHEMES[kind.factor_dtype], generator)
        return (torch.randn(shape, generator=generator) * 0.05).to(FLOAT_FACTORS[kind.factor_dtype])

    if kind.form == "single-factor":
        return Correction(factor(rows, kind.rank), None)
    is_transposed = kind.factor_dtype in FACTOR_SCHEMES
    lora_up = factor(kind.rank, rows) if is_transposed else factor(rows, kind.rank)
    return Correction(lora_up, factor(kind.rank, columns))


def random_linear(rows: int, columns: int, kind: LinearKind, generator: torch.Generator) -> LinearWeights:
    """A linear layer of ``kind`` with every value drawn at random."""
    return LinearWeights(
        quantized=random_codes(rows, columns, kind.scheme, generator),
        correction=None if kind.form == "none" else random_correction(rows, columns, kind, generator),
        input_scale=torch.rand(columns, generator=generator) + 0.5 if kind.has_input_scale else None,
        channel_order=torch.randperm(columns, generator=generator).to(torch.int32) if kind.has_channel_order else None,
        rotation_block=kind.rotation_block,
        activations=kind.activations,
        bias=torch.randn(rows, generator=generator).to(torch.bfloat16) if kind.has_bias else None,
    )


@dataclass(frozen=True)
class TinyModel:
    """All that goes into an artifact."""

    hf_config: dict[str, Any]
    linears: dict[str, LinearWeights]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_hf(self.hf_config, "tiny")

    def layer_linears(self, layer_index: int) -> dict[str, LinearWeights]:
        return {path: self.linears[path] for path in self.config.layer_linear_shapes(layer_index)}

    def layer_tensors(self, layer_index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer_index}."
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def rest(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith("model.layers.")}


def tiny_model(kind: LinearKind | None = None, seed: int = 0, **changes: Any) -> TinyModel:
    """A network of ``HF_CONFIG`` with ``changes``, its linear layers of ``kind``."""
    kind = kind or LinearKind()
    generator = torch.Generator().manual_seed(seed)
    hf_config = {**HF_CONFIG, **changes}
    config = LlamaConfig.from_hf(hf_config, "tiny")
    linears = {
        path: random_linear(
            shape.out_features,
            shape.in_features,
            replace(kind, has_bias=kind.has_bias or shape.has_bias),
            generator,
        )
        for path, shape in config.linear_shapes().items()
    }
    tensors = {}
    for name, shape in config.unquantized_shapes().items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = (values if len(shape) == 2 else 1 + 0.1 * values).to(torch.bfloat16)
    return TinyModel(hf_config, linears, tensors)


MX_KIND = LinearKind(
    scheme=QuantScheme(4, 32, format="mxint", exponent="ceil"),
    factor_dtype="mxint6",
    rotation_block=16,
    activations=ActivationScheme(4, 32),
)


def mixed_model(kind: LinearKind, **changes: Any) -> TinyModel:
    """``tiny_model`` with linear layers of ``kind`` in its first decoder layer, and of ``MX_KIND`` in the others."""
    changes = {"num_key_value_heads": 2, **changes}  # as wide as groups of factors are
    first, others = tiny_model(kind, **changes), tiny_model(MX_KIND, **changes)
    linears = {path: (first if path.startswith("model.layers.0.") else others).linears[path] for path in first.linears}
    return replace(first, linears=linears)


def records_of(linears: dict[str, LinearWeights]) -> dict[str, LinearRecord]:
    """A record per linear layer, with made-up errors."""
    return {path: LinearRecord.of(weights, 0.09, 0.03) for path, weights in linears.items()}


def open_writer(
    directory: Path, model: TinyModel, fingerprint: str = "build", overwrite: bool = False
) -> ArtifactWriter:
    """A writer for ``model``."""
    return ArtifactWriter(directory, model.config, fingerprint, overwrite=overwrite)


def write_layer(writer: ArtifactWriter, model: TinyModel, layer_index: int) -> None:
    """Write one decoder layer of ``model``."""
    linears = model.layer_linears(layer_index)
    writer.write_layer(layer_index, linears, model.layer_tensors(layer_index), records_of(linears))


def finish(writer: ArtifactWriter, model: TinyModel, **changes: Any) -> Manifest:
    """Write what follows the layers of ``model``, the rest unless it is there; ``changes`` replace arguments."""
    if not writer.has_rest():
        writer.write_rest(model.rest())
    arguments: dict[str, Any] = {
        "build": BuildConfig(),
        "hf_config": model.hf_config,
        "generation_config": GENERATION_CONFIG,
        "tokenizer_files": TOKENIZER_FILES,
        "checkpoint_fingerprint": "c" * 64,
        "calibration_fingerprint": "d" * 64,
        "evaluation": EVALUATION,
    }
    return writer.finish(**{**arguments, **changes})


def write_artifact(directory: Path, model: TinyModel | None = None, **changes: Any) -> Manifest:
    """Write the artifact of ``model`` in one go."""
    model = model or tiny_model()
    writer = open_writer(directory, model)
    for layer_index in range(model.config.num_hidden_layers):
        write_layer(writer, model, layer_index)
    return finish(writer, model, **changes)


def refusal(directory: Path) -> str:
    """Message of the ArtifactError that opening ``directory`` raises."""
    with pytest.raises(ArtifactError) as caught:
        ArtifactReader.open(directory).close()
    return str(caught.value)


@contextmanager
def content(file: Path, data: bytes) -> Iterator[None]:
    """``file`` with content ``data`` inside the block."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def sign(values: dict[str, Any]) -> bytes:
    """The manifest ``values`` as a file, with its own hash made right: written from the format's description."""
    values = {name: value for name, value in values.items() if name != "manifest_sha256"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    values["manifest_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    return tabular_json(values)


def sign_again(directory: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> None:
    """Record every listed file as it is now, apply ``change`` to the manifest, and sign it: a consistent lie."""
    manifest = directory / "quantization.json"
    values = json.loads(manifest.read_bytes())
    for name in values["files"]:
        if (directory / name).is_file():
            data = (directory / name).read_bytes()
            values["files"][name] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(values)
    manifest.write_bytes(sign(values))


def split_shard(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, taken apart by hand."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_shard(file: Path, header: object, data: bytes) -> None:
    """Write a safetensors file with any ``header`` at all: a JSON value, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
