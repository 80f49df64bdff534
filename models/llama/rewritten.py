"""A checkpoint that stands for another one with some of its parameters rewritten."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .config import LlamaConfig


class RewrittenCheckpoint:
    """What the rewrites have in common: all but some parameters and the fingerprint is as in ``base``."""

    def __init__(self, base: Checkpoint, description: Mapping[str, Any]) -> None:
        self.base = base
        self._description = {"rewrite": type(self).__name__, **description}

    @property
    def config(self) -> LlamaConfig:
        """The network's shape."""
        return self.base.config

    @property
    def hf_config(self) -> dict[str, Any]:
        """Content for ``config.json``."""
        return self.base.hf_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """Content for ``generation_config.json``; may be empty."""
        return self.base.generation_config

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """File name -> content of ``tokenizer.json`` and its companions."""
        return self.base.tokenizer_files

    @property
    def dense_bytes(self) -> int:
        """Size of all parameters in 16 bits; a tied head counts once."""
        return 2 * self.config.num_parameters

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the fingerprint of ``base`` and what is done to it, hex."""
        described = json.dumps([self.base.fingerprint, self._description], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        """The rewritten parameter ``name`` on the CPU; see ``Checkpoint``."""
        stored = self.base.tensor(name, narrow)
        path, _, kind = name.rpartition(".")
        rewritten = self._rewrite(path, kind, stored).contiguous()
        return rewritten.to(stored.dtype) if narrow else rewritten

    def _rewrite(self, path: str, kind: str, stored: Tensor) -> Tensor:
        """``stored``, the ``weight`` or ``bias`` (``kind``) of the module ``path``, rewritten."""
        raise NotImplementedError
