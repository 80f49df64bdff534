"""Small networks as artifacts, loaded for the native kernels and for the reference backend."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.artifact.execution import RunOptions
from models.artifact.load import LoadedModel, load_artifact
from models.artifact.writer import ArtifactWriter
from models.config import BuildConfig
from models.llama.batch import Batch
from models.llama.native import NativeLlama
from models.llama.network import Network
from models.quant.rtn import quantize_rtn
from models.scheme import EMBEDDING, ActivationScheme, VocabularyScheme
from models.types import LinearWeights
from tests.support.artifact_builder import (
    GENERATION_CONFIG,
    LinearKind,
    TinyModel,
    records_of,
    tiny_model,
    write_artifact,
    write_layer,
)
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = [int(token) for token in torch.randint(VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(5))]


@dataclass(frozen=True)
class Saved:
    """An artifact on disk."""

    path: Path

    def reference(self) -> Network:
        return load_artifact(self.path, dtype=torch.float32, backend="reference").model

    def loaded(self, **options: Any) -> LoadedModel:
        return load_artifact(self.path, dtype=torch.float32, options=RunOptions(**options))

    def native(self, **options: Any) -> NativeLlama:
        loaded = self.loaded(**options)
        assert isinstance(loaded.model, NativeLlama), loaded.execution
        return loaded.model


def network_of(kind: LinearKind | None = None, **changes: Any) -> TinyModel:
    """A tiny network in which the layers that share an input treat it alike, as built artifacts do."""
    model = tiny_model(kind, **{**SHAPE, **changes})
    for path, weights in model.linears.items():
        leader = path.replace("up_proj", "gate_proj").replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        first = model.linears[leader]
        if weights.quantized.in_features == first.quantized.in_features:
            shared = replace(weights, input_scale=first.input_scale, channel_order=first.channel_order)
            model.linears[path] = shared
    return model


def save(directory: Path, model: TinyModel, attention: ActivationScheme | None = None) -> Saved:
    """Write ``model`` as an artifact."""
    write_artifact(directory, model, tokenizer_files=tokenizer_files(), build=BuildConfig(attention=attention))
    return Saved(directory)


def save_quantized(directory: Path, model: TinyModel, vocabulary: VocabularyScheme) -> Saved:
    """Write ``model`` as an artifact whose embedding and head are codes, as far as ``vocabulary`` says."""
    config = model.config.with_vocabulary(vocabulary)
    writer = ArtifactWriter(directory, config, "build", False)
    for layer_index in range(config.num_hidden_layers):
        write_layer(writer, model, layer_index)
    rest, linears = model.rest(), {}
    for path, shape in config.vocabulary_shapes().items():
        dense = rest.get(f"{path}.weight", model.tensors[f"{EMBEDDING}.weight"])
        linears[path] = LinearWeights(quantize_rtn(dense.float(), vocabulary.scheme(path, shape.in_features)))
    rest = {name: tensor for name, tensor in rest.items() if name in config.unquantized_shapes()}
    writer.write_rest(rest, linears, records_of(linears))
    write_manifest(writer, model, BuildConfig(vocabulary=vocabulary))
    return Saved(directory)


def write_manifest(writer: ArtifactWriter, model: TinyModel, build: BuildConfig) -> None:
    """All of an artifact but its tensors."""
    writer.finish(
        build=build,
        hf_config=model.hf_config,
        generation_config=GENERATION_CONFIG,
        tokenizer_files=tokenizer_files(),
        checkpoint_fingerprint="c" * 64,
        calibration_fingerprint=None,
        evaluation={},
    )


@torch.inference_mode()
def logits_of(network: Network, tokens: list[int] | None = None) -> Tensor:
    """(num_tokens, vocab_size) of one sequence without a cache."""
    return network.logits(network(Batch.uncached([TOKENS if tokens is None else tokens])))
