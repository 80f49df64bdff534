"""One loader for whatever can be evaluated: an artifact, or a dense checkpoint to compare it with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.format import MANIFEST_FILE
from ..artifact.load import load_artifact
from ..device import default_dtype
from ..llama.checkpoint import DenseWeights, open_checkpoint
from ..llama.model import LlamaForCausalLM
from ..llama.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A network with its tokenizer, ready to be scored."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer


def load_for_evaluation(path_or_id: str, device: str, dtype: str, backend: str) -> Evaluated:
    """Load an artifact directory, or any checkpoint that ``open_checkpoint`` takes, densely.

    Args:
        path_or_id: artifact directory, checkpoint directory, .gguf file or Hub id.
        device: ``cpu``, ``cuda``, ``cuda:N``.
        dtype: ``auto`` (the device's own choice) or a torch floating-point type's name.
        backend: kernel backend for an artifact's layers; ``auto`` takes the first that can run each.

    Raises:
        ArtifactError, CheckpointError: it cannot be loaded.
    """
    target = torch.device(device)
    activations = default_dtype(target) if dtype == "auto" else getattr(torch, dtype)
    if (Path(path_or_id) / MANIFEST_FILE).is_file():
        loaded = load_artifact(Path(path_or_id), device=target, dtype=activations, backend=backend)
        return Evaluated(loaded.model, loaded.tokenizer)
    checkpoint = open_checkpoint(path_or_id)
    model = LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint, activations, target))
    return Evaluated(model, Tokenizer.from_files(checkpoint.tokenizer_files, checkpoint.generation_config))
