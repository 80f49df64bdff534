"""Opens an artifact: everything is checked first, then tensors are read one at a time, into memory of their own."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..closing import Closing
from ..errors import ArtifactError
from ..llama.config import LlamaConfig
from ..scheme import EMBEDDING, HEAD
from ..types import LinearWeights
from .format import CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, Manifest
from .jsonio import parse_json_object
from .linear import check_finite, decode_linear
from .shard import Shard
from .validate import (
    blaming,
    check_index,
    check_manifest,
    check_shard,
    network_config,
    read_contents,
    read_manifest,
    scan,
    verify_shards,
)

Verify = Literal["full", "structure"]


@dataclass(frozen=True, slots=True)
class Description:
    """All of an artifact but its tensors.

    tokenizer_files: content by file name
    """

    path: Path
    manifest: Manifest
    config: LlamaConfig
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_files: dict[str, bytes]

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read and check every file of the artifact in ``root`` but the shards.

        Raises:
            ArtifactError: anything is missing, damaged, inconsistent, or of another format version.
        """
        manifest = read_manifest(root, scan(root))
        contents = read_contents(root, manifest)
        hf_config = parse_json_object(contents[CONFIG_FILE], root / CONFIG_FILE)
        generation_config = parse_json_object(contents[GENERATION_CONFIG_FILE], root / GENERATION_CONFIG_FILE)
        config = network_config(hf_config, root, manifest)
        check_manifest(manifest, config, root)
        check_index(contents[INDEX_FILE], manifest, root)
        tokenizer_files = {name: contents[name] for name in manifest.tokenizer_files}
        return cls(root, manifest, config, hf_config, generation_config, tokenizer_files)


class ArtifactReader(Closing):
    """An open artifact. A context manager; tensors that were read stay valid after it is closed."""

    def __init__(self, description: Description, shards: dict[str, Shard], resources: ExitStack) -> None:
        """Use ``open``: it is what makes sure of the arguments."""
        self.path = description.path
        self.manifest = description.manifest
        self.config = description.config
        self.hf_config = description.hf_config
        self.generation_config = description.generation_config
        self.tokenizer_files = description.tokenizer_files
        self._shards = shards
        self._resources = resources

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "full") -> Self:
        """Open the artifact in directory ``path``.

        Args:
            path: the directory.
            verify: ``full`` compares every byte with its hash; ``structure`` leaves out the tensors' bytes, for
                whoever only looks at what an artifact consists of.

        Raises:
            ArtifactError: anything is missing, damaged, inconsistent, or of another format version; names the file
                and, where it applies, the tensor. No tensor has been allocated then.
        """
        root = Path(path)
        description = Description.read(root)
        manifest = description.manifest
        with ExitStack() as resources:
            shards: dict[str, Shard] = {}
            for name, tensors in manifest.tensors_by_file().items():
                with blaming(root / name):
                    shards[name] = resources.enter_context(Shard(root / name))
                check_shard(shards[name], tensors)
            if verify == "full":
                verify_shards(shards, manifest)
            return cls(description, shards, resources.pop_all())

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The unquantized tensor ``name`` in the type it is stored in, on ``device``.

        Raises:
            ArtifactError: there is none of that name, or a value is not finite.
        """
        if name not in self.manifest.tensors:
            raise ArtifactError(f"{self.path}: holds no tensor {name!r}")
        tensor = self._read(name, device)
        if tensor.is_floating_point():
            with blaming(self.path / self.manifest.tensors[name].file):
                check_finite(name, tensor)
        return tensor

    def linear(self, path: str, device: torch.device | str = "cpu") -> LinearWeights:
        """The quantized linear layer at module ``path``, on ``device``: packed as stored up to there, unpacked on it.

        Also a quantized output head, ``lm_head``, and a quantized embedding, ``model.embed_tokens``, whose rows are the
        vocabulary's. A head that shares the embedding's codes is read from there.

        Raises:
            ArtifactError: there is none, or a value would make the network wrong: a scale that is not positive, a
                number that is not finite, a channel order that is not a permutation.
        """
        if path == HEAD and path not in self.config.vocabulary and self.config.is_head_quantized:
            path = EMBEDDING
        record = self.manifest.linears.get(path) or self.manifest.vocabulary.get(path)
        if record is None:
            raise ArtifactError(f"{self.path}: holds no linear layer {path!r}")
        with blaming(self.path / self.manifest.tensors[f"{path}.weight_packed"].file):
            return decode_linear(path, record, partial(self._read, device=device))

    def _read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self._shards[self.manifest.tensors[name].file].read(name, device)

    def close(self) -> None:
        """Close the files."""
        self._resources.close()
