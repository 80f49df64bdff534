"""One safetensors file: written in one streaming pass with its hashes, and read without trusting its header.

Layout of safetensors: 8 bytes, the header's length (little-endian); the header, JSON of name -> dtype, shape,
data_offsets, padded with blanks to a multiple of 8; then the tensors' bytes without a gap, in the order of their
offsets. Tensors are laid out here by falling element size and then by name, so that each is aligned.

Tensors are read from a file that stays open, not mapped: what was verified is what is read, even when the directory
is replaced meanwhile, and no page of the file counts as this process's memory.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..closing import Closing
from .files import HASH_CHUNK_BYTES, atomic_file
from .format import FileRecord, TensorRecord
from .jsonio import canonical_json, damaged, parse_json_object
from .layout import DTYPE_NAMES, DTYPES, StoredTensor

MAX_HEADER_BYTES = 1 << 20
"""A shard holds one decoder layer: a header takes about 10 kB."""

_PREFIX_BYTES = 8
_METADATA = "__metadata__"
_HEADER = "the header"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What is known of a shard once it is written: its own record, and those of its tensors."""

    file: FileRecord
    tensors: dict[str, TensorRecord]


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """A tensor's type, shape and place: bytes ``start .. end`` of the file."""

    stored: StoredTensor
    start: int
    end: int


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> ShardRecord:
    """Write ``tensors`` (any device, any layout) to ``path``, complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _encode_header({name: tensors[name] for name in order})
    file_hash, records = hashlib.sha256(header), {}
    with atomic_file(path) as file:
        file.write(header)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            data = tensor.flatten().view(torch.uint8).numpy().data
            file.write(data)
            file_hash.update(data)
            digest = hashlib.sha256(data).hexdigest()
            records[name] = TensorRecord(
                file=path.name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), sha256=digest
            )
        num_bytes = file.tell()
    return ShardRecord(FileRecord(num_bytes=num_bytes, sha256=file_hash.hexdigest()), records)


def _encode_header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = canonical_json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def parse_header(data: bytes, file: Path, file_bytes: int) -> dict[str, TensorSpan]:
    """Tensors by name; ``data`` is the header without its length, ``file_bytes`` the size of the whole file.

    Raises:
        ArtifactError: not a safetensors header, or spans that overlap, leave gaps, or do not fill the file.
    """
    values = parse_json_object(data, file, _HEADER)
    values.pop(_METADATA, None)
    base = _PREFIX_BYTES + len(data)
    spans = {name: _parse_span(name, entry, base, file) for name, entry in values.items()}
    for name, span in spans.items():
        if span.end > file_bytes:
            raise damaged(file, f"ends at byte {span.end}, but the file has {file_bytes}", repr(name))
    position = base
    for name, span in sorted(spans.items(), key=lambda item: item[1].start):
        if span.start != position:
            raise damaged(file, f"begins at byte {span.start} of the file, but {position} is where it must", repr(name))
        position = span.end
    if position != file_bytes:
        raise damaged(file, f"the tensors end at byte {position}, but the file has {file_bytes}")
    return spans


def _parse_span(name: str, entry: object, base: int, file: Path) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(file, "its entry in the header is not dtype, shape and data_offsets", repr(name))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(file, f"type {dtype!r} is none of {sorted(DTYPES)}", repr(name))
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise damaged(file, f"shape {shape!r} or offsets {offsets!r} are not lists of counts", repr(name))
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise damaged(file, f"shape {shape} takes {num_bytes} bytes, offsets {offsets} do not span them", repr(name))
    return TensorSpan(StoredTensor(dtype, tuple(shape)), base + offsets[0], base + offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


class Shard(Closing):
    """A safetensors file, open for reading, its header checked. Not for several threads at a time.

    Raises:
        ArtifactError: the header is wrong in any way.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.file_bytes = os.fstat(self._file.fileno()).st_size
            self.spans = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def _read_header(self) -> dict[str, TensorSpan]:
        if self.file_bytes < _PREFIX_BYTES:
            raise damaged(self.path, f"truncated: {self.file_bytes} bytes hold no header")
        length = int.from_bytes(bytes(self._read_bytes(0, _PREFIX_BYTES)), "little")
        if length > MAX_HEADER_BYTES:
            raise damaged(self.path, f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
        if length > self.file_bytes - _PREFIX_BYTES:
            raise damaged(self.path, f"truncated: the header claims {length} bytes of {self.file_bytes}")
        data = bytes(self._read_bytes(_PREFIX_BYTES, _PREFIX_BYTES + length))
        return parse_header(data, self.path, self.file_bytes)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor ``name``, in memory of its own on ``device``.

        Raises:
            ArtifactError: the file became shorter since it was opened.
        """
        span, target = self.spans[name], torch.device(device)
        # From pinned memory the copy to a GPU is several times as fast; PyTorch keeps it for the next tensor.
        data = torch.empty(span.end - span.start, dtype=torch.uint8, pin_memory=target.type == "cuda")
        self._read_into(data.numpy().data, span.start)
        data = data.to(target)
        return data.view(DTYPES[span.stored.dtype]).reshape(span.stored.shape)

    def sha256(self) -> str:
        """Hash of the whole file."""
        return self._hash(0, self.file_bytes)

    def tensor_sha256(self, name: str) -> str:
        """Hash of one tensor's bytes."""
        return self._hash(self.spans[name].start, self.spans[name].end)

    def _hash(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(HASH_CHUNK_BYTES, end - start)))
        for position in range(start, end, HASH_CHUNK_BYTES):
            chunk = buffer[: min(HASH_CHUNK_BYTES, end - position)]
            self._read_into(chunk, position)
            digest.update(chunk)
        return digest.hexdigest()

    def _read_bytes(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        self._read_into(memoryview(data), start)
        return data

    def _read_into(self, target: memoryview, position: int) -> None:
        self._file.seek(position)
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise damaged(self.path, f"truncated while it was read, at byte {position + done}")
            done += count
