"""Writing an export's directory: all of it or nothing, in shards of one decoder layer each."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..artifact.format import shard_name
from ..errors import ExportError
from .source import ExportSource

VERIFICATION_FILE = "verification.json"
INDEX_FILE = "model.safetensors.index.json"


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write to, which becomes ``out`` when the block ends well and vanishes when it does not.

    Raises:
        ExportError: ``out`` is there already and is not an export, or may not be replaced.
    """
    if out.exists() and not overwrite:
        raise ExportError(f"{out}: exists already; choose another directory, or --overwrite to replace an export")
    if out.exists() and not (out / VERIFICATION_FILE).is_file():
        raise ExportError(f"{out}: holds no {VERIFICATION_FILE}, so it is no export, and is not replaced")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``values`` with two blanks of indentation."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(directory: Path, shards: Iterator[dict[str, Tensor]], num_shards: int) -> None:
    """One safetensors file per item of ``shards``, and the index that Hugging Face wants beside them."""
    weight_map: dict[str, str] = {}
    total = 0
    for index, tensors in enumerate(shards):
        name = shard_name(index, num_shards)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(tensors), name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_companions(directory: Path, source: ExportSource, config: Mapping[str, Any]) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files."""
    write_json(directory / "config.json", config)
    if source.reader.generation_config:
        write_json(directory / "generation_config.json", source.reader.generation_config)
    for name, content in source.reader.tokenizer_files.items():
        (directory / name).write_bytes(content)


def file_records(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below ``directory`` but the proof itself, by relative name."""
    records = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != VERIFICATION_FILE:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            records[name] = {"num_bytes": path.stat().st_size, "sha256": digest}
    return records
