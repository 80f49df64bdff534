"""What tests of builds ask of transformers and of directories."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


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
