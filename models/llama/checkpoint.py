"""Checkpoints behind one protocol: Hugging Face directories, GGUF files and Hub ids, read tensor by tensor."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers.linear import DenseLinear
from .config import LlamaConfig
from .hub import download_snapshot, is_hub_id

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

NARROW_NAMES = frozenset({"model.embed_tokens.weight", "lm_head.weight"})
"""Parameters that the network widens row by row as it uses them."""


class Checkpoint(Protocol):
    """A dense checkpoint. Opening it checks every name and shape; parameters are read one at a time, on demand.

    hf_config:         content for ``config.json``
    generation_config: content for ``generation_config.json``; may be empty
    tokenizer_files:   file name -> content of ``tokenizer.json`` and its companions
    dense_bytes:       size of all parameters in 16 bits
    fingerprint:       sha256 over configuration, tokenizer and all parameters, hex
    """

    @property
    def config(self) -> LlamaConfig:
        """The network's shape."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """Content for ``config.json``."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """Content for ``generation_config.json``; may be empty."""
        ...

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """File name -> content of ``tokenizer.json`` and its companions."""
        ...

    @property
    def dense_bytes(self) -> int:
        """Size of all parameters in 16 bits; a tied head counts once."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration, tokenizer and all parameters, hex; reads every byte on first use."""
        ...

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        """The parameter ``name``, as it is stored, on the CPU.

        With ``narrow``, one that is wider than 16 bits comes as bfloat16, without a wider copy in memory.

        Raises:
            CheckpointError: it does not exist or cannot be read.
        """
        ...


def open_checkpoint(path_or_id: str, revision: str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, a GGUF file, or a Hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.

    Code that comes with a checkpoint is never run and pickles are never opened.

    Args:
        path_or_id: a local path is preferred to a Hub id of the same spelling.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: nothing is there, it is not in a supported format or architecture, or it is damaged.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_file(path)
    if is_hub_id(path_or_id):
        return _open_directory(download_snapshot(path_or_id, revision))
    raise CheckpointError(
        f"{path_or_id}: there is no such file or directory, and it is not a Hub id (organisation/name)"
    )


def _open_directory(path: Path) -> Checkpoint:
    from .safetensors_checkpoint import SafetensorsCheckpoint

    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        if len(files) > 1:
            raise CheckpointError(f"{path}: holds {len(files)} GGUF files; name one, such as {files[0]}")
        return _open_file(files[0])
    return SafetensorsCheckpoint(path)


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        from .gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: {how_to_convert(path.parent)}")
    raise CheckpointError(f"{path}: is not a .gguf file; for safetensors, name the directory that also has config.json")


def how_to_convert(directory: Path) -> str:
    """What to do about a checkpoint that is a pickle."""
    return (
        "pickled checkpoints can run any code when they are opened, so only safetensors are read; convert once, "
        'if you trust it, with: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors', safe_serialization=True)\" "
        "and copy the tokenizer files next to it"
    )


def combine_fingerprint(checkpoint: Checkpoint, file_digests: Mapping[str, bytes]) -> str:
    """sha256 (hex) over what makes ``checkpoint``: its configuration, its tokenizer, and its files by digest."""
    parts = checkpoint.tokenizer_files | dict(file_digests)
    for name, values in (("config", checkpoint.hf_config), ("generation_config", checkpoint.generation_config)):
        parts[name] = json.dumps(values, sort_keys=True).encode()
    combined = hashlib.sha256()
    for name in sorted(parts):
        combined.update(f"{name} {hashlib.sha256(parts[name]).hexdigest()}\n".encode())
    return combined.hexdigest()


def file_digest(path: Path) -> bytes:
    """sha256 of a file's content, in bounded memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


class DenseWeights:
    """The dense parameters of a checkpoint as a weight source.

    Everything comes in ``dtype`` on ``device``, but for an embedding and a head that are stored narrower: these stay as
    they are, since the network widens them row by row.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self._linear_shapes = checkpoint.config.linear_shapes()

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name``.

        Raises:
            CheckpointError: it does not exist or cannot be read.
        """
        tensor = self.checkpoint.tensor(name)
        keeps_dtype = name in NARROW_NAMES and tensor.dtype.itemsize < self.dtype.itemsize
        return tensor.to(self.device, tensor.dtype if keeps_dtype else self.dtype)

    def linear(self, path: str) -> nn.Module:
        """The ``DenseLinear`` for module ``path``."""
        bias = self.tensor(f"{path}.bias") if self._linear_shapes[path].has_bias else None
        return DenseLinear(self.tensor(f"{path}.weight"), bias)
