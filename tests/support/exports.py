"""Small artifacts to export, with a tokenizer that works."""

import functools
from pathlib import Path
from typing import Any

from models.artifact.format import Manifest
from tests.support.artifact_builder import LinearKind, TinyModel, tiny_model, write_artifact
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

NETWORK: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def exportable(kind: LinearKind | None = None, **changes: Any) -> TinyModel:
    """A network whose layers are as wide as engines want them."""
    return tiny_model(kind, **{**NETWORK, **changes})


def write_exportable(directory: Path, model: TinyModel) -> Manifest:
    """Its artifact."""
    return write_artifact(directory, model, tokenizer_files=_tokenizer_files())


_tokenizer_files = functools.cache(tokenizer_files)
