"""Hugging Face directories: safetensors files, sharded or not, with ``config.json`` and ``tokenizer.json``."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import PICKLE_SUFFIXES, combine_fingerprint, file_digest, how_to_convert
from .config import LlamaConfig
from .config_fields import read_json_object
from .tokenizer_files import read_tokenizer_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Derived from the configuration; old checkpoints stored it."""

MAX_LISTED = 5


class SafetensorsCheckpoint:
    """A directory that ``save_pretrained`` wrote. One shard at a time is mapped into memory, never read whole.

    Raises:
        CheckpointError: on construction, when a file or a tensor is missing, damaged, or not what ``config.json`` says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf_config: dict[str, Any] = read_json_object(directory / "config.json")
        self.config = LlamaConfig.from_hf(self.hf_config, str(directory / "config.json"))
        generation_config = directory / "generation_config.json"
        self.generation_config = read_json_object(generation_config) if generation_config.exists() else {}
        self.tokenizer_files = read_tokenizer_files(directory)
        self._shards: dict[str, Path] = _locate(directory)
        self._open_path: Path | None = None
        self._open_shard: Any = None
        self._check()

    @property
    def dense_bytes(self) -> int:
        """Size of all parameters in 16 bits; a tied head counts once."""
        return 2 * self.config.num_parameters

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over configuration, tokenizer and all weight files, hex; reads every byte on first use."""
        files = {str(path.relative_to(self.directory)): file_digest(path) for path in set(self._shards.values())}
        return combine_fingerprint(self, files)

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        """The parameter ``name``, as it is stored, on the CPU; its pages are read as they are used.

        With ``narrow``, one that is stored wider than 16 bits comes as bfloat16.

        Raises:
            CheckpointError: it does not exist or cannot be read.
        """
        if name not in self._shards:
            raise CheckpointError(f"{self.directory}: there is no tensor {name}")
        path = self._shards[name]
        try:
            tensor: Tensor = self._shard(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error
        return tensor.to(torch.bfloat16) if narrow and tensor.dtype.itemsize > 2 else tensor

    def _shard(self, path: Path) -> Any:
        if path != self._open_path:
            self._open_shard = _open(path)
            self._open_path = path
        return self._open_shard

    def _check(self) -> None:
        expected = self.config.tensor_shapes()
        missing = [name for name in expected if name not in self._shards]
        if missing:
            raise CheckpointError(f"{self.directory}: {_listed(missing)} missing from the safetensors files")
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        found = {name for name in self._shards if not name.endswith(IGNORED_SUFFIX)}
        surplus = sorted(found - expected.keys() - tied)
        if surplus:
            raise CheckpointError(
                f"{self.directory}: {_listed(surplus)} unknown to the architecture in config.json; "
                "the network would silently ignore what was trained"
            )
        # Shard by shard, so that each file is opened once.
        for name in sorted(expected, key=lambda name: (str(self._shards[name]), name)):
            self._check_tensor(name, expected[name])
        if tied & self._shards.keys():
            self._check_tied()

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        path = self._shards[name]
        try:
            entry = self._shard(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} is not in this file, though the index says so") from error
        if tuple(entry.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {tuple(entry.get_shape())}, config.json makes it {shape}"
            )
        if entry.get_dtype() not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {entry.get_dtype()}; start from a checkpoint in "
                f"{', '.join(FLOAT_DTYPES)}"
            )

    def _check_tied(self) -> None:
        head, embedding = self.tensor("lm_head.weight"), self.tensor("model.embed_tokens.weight")
        if head.shape != embedding.shape or not head.equal(embedding):
            raise CheckpointError(
                f"{self.directory}: config.json ties the head to the embedding, but the files hold a different "
                "lm_head.weight; set tie_word_embeddings to false in config.json if the head is its own"
            )


def _locate(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if (directory / INDEX).exists():
        return _read_index(directory)
    single = directory / SINGLE
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = [entry.name for entry in directory.iterdir() if entry.suffix in PICKLE_SUFFIXES]
        advice = how_to_convert(directory) if pickles else "a checkpoint needs model.safetensors"
        raise CheckpointError(f"{directory}: there are no .safetensors files; {advice}")
    located: dict[str, Path] = {}
    for path in files:
        for name in _open(path).keys():  # noqa: SIM118 - not a dict
            if name in located:
                raise CheckpointError(f"{path}: tensor {name} is also in {located[name].name}, and there is no {INDEX}")
            located[name] = path
    return located


def _read_index(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' does not map tensor names to file names; fetch the file again")
    for name in set(weight_map.values()):
        shard = PurePosixPath(name)
        if shard.is_absolute() or ".." in shard.parts or "\\" in name or shard.suffix != ".safetensors":
            raise CheckpointError(f"{index}: shard {name!r} is not a .safetensors file inside the checkpoint directory")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard}: the file is missing, though {INDEX} names it")
    return {tensor: directory / name for tensor, name in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or not a safetensors file ({error}); fetch it again") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_LISTED])
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{rest} are"
