"""What tests of builds ask of transformers and of directories."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.support.tiny_checkpoints import VOCAB_SIZE


def dense_model(checkpoint_dir: Path) -> nn.Module:
    """transformers' network of a checkpoint, float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32).eval()


@torch.no_grad()
def inputs_of(model: nn.Module, path: str, tokens: Tensor) -> Tensor:
    """(num_tokens, in_features) float64: what transformers feeds to the linear layer at ``path``."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    model(tokens)
    handle.remove()
    return seen[0].flatten(0, 1)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file by name."""
    return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in directory.iterdir()}


def write_tokens(directory: Path, count: int) -> Path:
    """A file of ``count`` seeded tokens in ``directory``, for calibration."""
    tokens = torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    path = directory / "tokens.json"
    path.write_text(json.dumps(tokens), encoding="utf-8")
    return path
