"""One loader for whatever can be evaluated: an artifact, or a dense checkpoint to compare it with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.execution import RunOptions
from ..artifact.format import MANIFEST_FILE
from ..artifact.load import load_artifact
from ..device import default_dtype
from ..errors import EvaluationError
from ..llama.checkpoint import DenseWeights, open_checkpoint
from ..llama.model import LlamaForCausalLM
from ..llama.network import Network
from ..llama.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A network with its tokenizer, ready to be scored."""

    model: Network
    tokenizer: Tokenizer


def parse_device(device: str) -> torch.device:
    """``device`` as torch names it.

    Raises:
        EvaluationError: there is no such device here.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise EvaluationError(f"device {device!r}: unknown; choose cpu, cuda or cuda:N") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} found" if torch.cuda.is_available() else "none found"
        raise EvaluationError(f"device {device!r}: no such CUDA device here ({found}); choose cpu")
    return target


def load_for_evaluation(path_or_id: str, device: str, dtype: str, options: RunOptions | None = None) -> Evaluated:
    """Load an artifact directory, or any checkpoint that ``open_checkpoint`` takes, densely.

    Args:
        path_or_id: artifact directory, checkpoint directory, .gguf file or Hub id.
        device: ``cpu``, ``cuda``, ``cuda:N``.
        dtype: ``auto`` (the device's own choice) or a torch floating-point type's name.
        options: which kernels run an artifact; None: the first that can run each layer.

    Raises:
        ArtifactError, CheckpointError: it cannot be loaded.
        EvaluationError: there is no such device or type.
    """
    target = parse_device(device)
    activations = default_dtype(target) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(activations, torch.dtype) or not activations.is_floating_point:
        raise EvaluationError(f"dtype {dtype!r}: choose auto, float32, bfloat16 or float16")
    if (Path(path_or_id) / MANIFEST_FILE).is_file():
        loaded = load_artifact(Path(path_or_id), device=target, dtype=activations, options=options)
        return Evaluated(loaded.model, loaded.tokenizer)
    checkpoint = open_checkpoint(path_or_id)
    model = LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint, activations, target))
    return Evaluated(model, Tokenizer.from_files(checkpoint.tokenizer_files, checkpoint.generation_config))
