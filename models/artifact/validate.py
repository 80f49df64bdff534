"""What is checked of an artifact before any tensor is allocated. Nothing in the directory is trusted.

The order is that of what each step needs: names and sizes, the manifest, the small files against their hashes, the
configuration, the tensors which it implies, the shards' headers, and the shards against their hashes.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ArtifactError, CheckpointError, SchemeError
from ..llama.config import LlamaConfig
from .assemble import component_bytes, dense_bytes, effective_bits, expected_tensors, index_bytes, record_bits
from .files import record_of
from .format import (
    CONFIG_FILE,
    FORMAT,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    PICKLE_SUFFIXES,
    Manifest,
    TensorRecord,
    self_hash,
    shard_name,
)
from .jsonio import damaged, first_problem, parse_json_object, tabular_json
from .layout import StoredTensor, TensorError, check_names, check_tensors
from .shard import Shard

MAX_HASH_THREADS = 4
UNFINISHED = "the build is not finished: start the same build again"


@contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Say that ``file`` is what a TensorError or an OSError is about."""
    try:
        yield
    except TensorError as problem:
        raise damaged(file, problem.problem, problem.tensor) from None
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error}; check the disk and the file's permissions") from error


def scan(root: Path) -> dict[str, int]:
    """Sizes of the regular files in ``root`` by name.

    Raises:
        ArtifactError: not a directory, a file that holds pickled data, or a link that leads outside.
    """
    if not root.is_dir():
        if (root.parent / f"{root.name}.partial").is_dir():
            raise ArtifactError(f"{root}: {UNFINISHED}")
        problem = "is a file" if root.exists() else "does not exist"
        raise ArtifactError(f"{root}: {problem}; give the directory of an artifact that `qerve build` wrote")
    sizes = {}
    with blaming(root):
        real_root = os.path.realpath(root)  # unlike Path.resolve, it does not raise on a link that leads to itself
        for entry in sorted(root.iterdir()):
            if entry.suffix.lower() in PICKLE_SUFFIXES:
                raise ArtifactError(f"{entry}: pickled data can run code and has no place in an artifact; remove it")
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(real_root):
                raise ArtifactError(f"{entry}: links to outside the artifact; copy the files themselves (cp -rL)")
            if entry.exists() and stat.S_ISREG(entry.stat().st_mode):
                sizes[entry.name] = entry.stat().st_size
    return sizes


def read_manifest(root: Path, sizes: Mapping[str, int]) -> Manifest:
    """Read and check the manifest by itself, then the names and sizes of the files it lists.

    Raises:
        ArtifactError: missing, of another format version, not what the build wrote, or the files differ.
    """
    file = root / MANIFEST_FILE
    if MANIFEST_FILE not in sizes:
        is_partial = (root / "progress").is_dir() or (root.parent / "progress").is_dir()
        hint = UNFINISHED if is_partial else "not an artifact: make one with `qerve build`"
        raise ArtifactError(f"{file}: is missing; {hint}")
    data = _read_bounded(file, sizes[MANIFEST_FILE])
    values = parse_json_object(data, file)
    if values.get("format") != FORMAT:
        found = repr(values.get("format"))[:80]
        raise ArtifactError(
            f"{file}: format {found}, but this version of qerve reads {FORMAT!r}; "
            "rebuild the artifact, or use the version of qerve that wrote it"
        )
    _check_self_hash(values, data, file)
    try:
        manifest = Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise damaged(file, first_problem(error)) from None
    except SchemeError as error:
        raise damaged(file, f"'build': {error}") from None
    _check_files(manifest, root, sizes)
    return manifest


def _check_self_hash(values: dict[str, Any], data: bytes, file: Path) -> None:
    try:
        is_intact = values.get("manifest_sha256") == self_hash(values) and data == tabular_json(values)
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise damaged(file, "its content does not match its manifest_sha256")


def _check_files(manifest: Manifest, root: Path, sizes: Mapping[str, int]) -> None:
    for name, record in manifest.files.items():
        if name not in sizes:
            raise damaged(root / name, "is missing")
        if sizes[name] != record.num_bytes:
            raise damaged(root / name, f"has {sizes[name]} bytes, but {record.num_bytes} were written")
    for name in (CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE):
        if name not in manifest.files:
            raise damaged(root / MANIFEST_FILE, f"does not list {name}")
    for name in sizes:
        if name.endswith(".safetensors") and name not in manifest.files:
            raise ArtifactError(f"{root / name}: nothing vouches for this file; remove it from the artifact")


def read_contents(root: Path, manifest: Manifest) -> dict[str, bytes]:
    """Content of every listed file but the shards, by name.

    Raises:
        ArtifactError: too large, or not what the build wrote.
    """
    contents = {}
    for name, record in manifest.files.items():
        if not name.endswith(".safetensors"):
            contents[name] = _read_bounded(root / name, record.num_bytes)
            if record_of(contents[name]) != record:
                raise damaged(root / name, "its content does not match its sha256")
    return contents


def _read_bounded(file: Path, num_bytes: int) -> bytes:
    if num_bytes > MAX_JSON_BYTES:
        raise ArtifactError(f"{file}: {num_bytes} bytes, more than the {MAX_JSON_BYTES} allowed; rebuild the artifact")
    with blaming(file):
        return file.read_bytes()


def network_config(hf_config: dict[str, Any], root: Path, manifest: Manifest) -> LlamaConfig:
    """The network that ``config.json`` describes, run as the manifest says, with as many layers as shards.

    Raises:
        ArtifactError: not a supported network, attention or a vocabulary that cannot be, or shards that are not those
            of its layers.
    """
    try:
        config = LlamaConfig.from_hf(hf_config, str(root / CONFIG_FILE))
        config = config.with_attention(manifest.build.attention).with_vocabulary(manifest.build.vocabulary)
    except CheckpointError as error:
        raise ArtifactError(f"{error}; rebuild the artifact") from error
    except SchemeError as error:
        raise damaged(root / MANIFEST_FILE, f"'build': {error}") from None
    shards = manifest.shards
    if len(shards) != config.num_hidden_layers + 1:
        raise damaged(root / CONFIG_FILE, f"{config.num_hidden_layers} decoder layers, but {len(shards)} shards")
    with blaming(root / MANIFEST_FILE):
        check_names(shards, {shard_name(index, len(shards)) for index in range(len(shards))}, "shard")
    return config


def check_manifest(manifest: Manifest, config: LlamaConfig, root: Path) -> None:
    """Check that the manifest says of the tensors, and of their sums, what configuration and records imply.

    Raises:
        ArtifactError: naming the tensor, record or sum that differs.
    """
    file = root / MANIFEST_FILE
    with blaming(file):
        expected = expected_tensors(config, manifest.linears, manifest.vocabulary)
        check_tensors({name: StoredTensor(it.dtype, it.shape) for name, it in manifest.tensors.items()}, expected)
    for name, spec in expected.items():
        if manifest.tensors[name].file != spec.file:
            raise damaged(file, f"listed in {manifest.tensors[name].file}, but belongs in {spec.file}", name)
    for path, record in (manifest.linears | manifest.vocabulary).items():
        if not math.isclose(record.effective_bits, record_bits(record), rel_tol=1e-12):
            raise damaged(file, f"{path}: effective_bits {record.effective_bits}, but its tensors take another number")
    sums = {
        "component_bytes": (manifest.component_bytes, component_bytes(manifest.tensors, expected)),
        "effective_bits": (manifest.effective_bits, effective_bits(manifest.linears)),
        "dense_bytes": (manifest.dense_bytes, dense_bytes(config)),
    }
    for name, (stated, implied) in sums.items():
        if stated != implied:
            raise damaged(file, f"{name} is {stated}, but the records imply {implied}")


def check_index(contents: bytes, manifest: Manifest, root: Path) -> None:
    """Check that the index places every tensor where the manifest does.

    Raises:
        ArtifactError: naming the first tensor that differs.
    """
    if contents == index_bytes(manifest.tensors):
        return
    file = root / INDEX_FILE
    weight_map = parse_json_object(contents, file).get("weight_map")
    if isinstance(weight_map, dict):
        with blaming(file):
            check_names(weight_map.keys(), manifest.tensors.keys(), "tensor")
        for name, record in manifest.tensors.items():
            if weight_map[name] != record.file:
                raise damaged(file, f"placed in {weight_map[name]!r}, but the manifest says {record.file}", name)
    raise damaged(file, "differs from the index that the manifest implies")


def check_shard(shard: Shard, listed: Mapping[str, TensorRecord]) -> None:
    """Check that a shard's header says what the manifest does of its tensors, which are ``listed``.

    Raises:
        ArtifactError: naming the tensor.
    """
    with blaming(shard.path):
        check_names(shard.spans.keys(), listed.keys(), "tensor")
    for name, record in listed.items():
        found = shard.spans[name].stored
        if found != StoredTensor(record.dtype, record.shape):
            raise damaged(
                shard.path,
                f"{found.dtype} {found.shape}, but the manifest says {record.dtype} {record.shape}",
                name,
            )


def verify_shards(shards: Mapping[str, Shard], manifest: Manifest) -> None:
    """Compare every shard with its hash, several at a time.

    Raises:
        ArtifactError: naming the first shard that differs, and the tensor in it, or its header.
    """
    num_threads = min(MAX_HASH_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="qerve-verify") as pool:
        for name, digest in zip(shards, pool.map(_hash_shard, shards.values()), strict=True):
            if digest != manifest.files[name].sha256:
                raise _damage(shards[name], manifest)


def _hash_shard(shard: Shard) -> str:
    with blaming(shard.path):
        return shard.sha256()


def _damage(shard: Shard, manifest: Manifest) -> ArtifactError:
    with blaming(shard.path):
        for name in sorted(shard.spans, key=lambda name: shard.spans[name].start):
            if shard.tensor_sha256(name) != manifest.tensors[name].sha256:
                return damaged(shard.path, "its bytes do not match their sha256", name)
    return damaged(shard.path, "the header does not match the file's sha256")
