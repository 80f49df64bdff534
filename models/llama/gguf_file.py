"""A strict reader of the GGUF container: every length is checked before it is believed, and tensors stay on disk.

magic "GGUF", version, number of tensors, number of metadata entries      (little-endian throughout)
metadata: key, value type, value                                          (string: length + bytes; array: type + length)
tensors:  name, dimensions (fastest first), type, offset into the data
data, aligned
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, dequantize
from torch import Tensor

from ..errors import CheckpointError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
DEQUANTIZE_ELEMENTS = 1 << 20

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is. shape: slowest dimension first, as in torch; offset: from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """Metadata and tensors of one GGUF file.

    Raises:
        CheckpointError: on construction, when the file is damaged, truncated, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from error
        cursor = _Cursor(self._data, path)
        num_tensors, num_entries = _read_preamble(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = cursor.string("a metadata key")
            self.metadata[key] = cursor.value(key)
        self.tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = cursor.string("a tensor name")
            self.tensors[name] = cursor.tensor(name)
        self._place(cursor.offset)

    def read(self, name: str, narrow: bool = False) -> Tensor:
        """Tensor ``name`` on the CPU: float16 and bfloat16 as they are, every other type dequantized to float32.

        Args:
            name: as in the file.
            narrow: give bfloat16 for what would be float32; the wider form is never whole in memory.

        Raises:
            CheckpointError: its type cannot be dequantized.
        """
        entry = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, entry.num_bytes, entry.offset)
        if entry.kind == GGMLQuantizationType.BF16:
            return torch.from_numpy(raw.copy()).view(torch.bfloat16).view(entry.shape)
        if entry.kind == GGMLQuantizationType.F16:
            return torch.from_numpy(raw.view(np.float16).copy()).view(entry.shape)
        return self._dequantize(name, entry, raw, torch.bfloat16 if narrow else torch.float32).view(entry.shape)

    def _dequantize(self, name: str, entry: GgufTensor, raw: npt.NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
        """Some rows at a time: the gguf package holds everything twice before it joins its pieces."""
        blocks = raw.reshape(-1, raw.size * entry.shape[-1] // math.prod(entry.shape))
        values = torch.empty(len(blocks), entry.shape[-1], dtype=dtype)
        step = max(1, DEQUANTIZE_ELEMENTS // entry.shape[-1])
        try:
            with np.errstate(all="ignore"):
                for start in range(0, len(blocks), step):
                    rows = dequantize(blocks[start : start + step], entry.kind)
                    values[start : start + step] = torch.from_numpy(np.array(rows, dtype=np.float32))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {entry.kind.name}, not supported"
            ) from error
        return values

    def _place(self, header_bytes: int) -> None:
        """Make the tensors' offsets absolute, now that the end of the header is known."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two")
        start = -(-header_bytes // alignment) * alignment
        for name, entry in self.tensors.items():
            offset = start + entry.offset
            if entry.offset % alignment or offset + entry.num_bytes > len(self._data):
                raise CheckpointError(
                    f"{self.path}: tensor {name} would end {offset + entry.num_bytes} bytes into a file of "
                    f"{len(self._data)}; the file is truncated or damaged, fetch it again"
                )
            self.tensors[name] = GgufTensor(entry.shape, entry.kind, offset, entry.num_bytes)


def _read_preamble(cursor: "_Cursor") -> tuple[int, int]:
    """Check magic and version; returns the numbers of tensors and of metadata entries."""
    if cursor.scalar("<u4", "the magic number") != GGUF_MAGIC:
        raise CheckpointError(f"{cursor.path}: is not a GGUF file")
    version = cursor.scalar("<u4", "the version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{cursor.path}: GGUF version {version} is not supported (little-endian {' and '.join(map(str, VERSIONS))} "
            "are); convert the model again with a current llama.cpp"
        )
    return cursor.scalar("<u8", "the number of tensors"), cursor.scalar("<u8", "the number of metadata entries")


class _Cursor:
    """Reads forward through the header; any length that leads outside of the file is an error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self.path = path
        self.offset = 0

    def scalar(self, dtype: str, what: str) -> Any:
        """One number or boolean."""
        return self._array(dtype, 1, what)[0]

    def string(self, what: str) -> str:
        """Length and UTF-8 bytes."""
        length = self.scalar("<u8", what)
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(what) from error

    def value(self, what: str) -> Any:
        """A typed metadata value: number, boolean, string, or list of these."""
        kind = self._value_type(what)
        if kind is GGUFValueType.ARRAY:
            item_kind = self._value_type(what)
            length = self.scalar("<u8", what)
            if item_kind in _SCALARS:
                return self._array(_SCALARS[item_kind], length, what)
            if item_kind is GGUFValueType.STRING and length <= len(self._data):
                return [self.string(what) for _ in range(length)]
            raise self._damaged(what)
        return self.string(what) if kind is GGUFValueType.STRING else self.scalar(_SCALARS[kind], what)

    def tensor(self, name: str) -> GgufTensor:
        """What the header says about tensor ``name``; the offset is still relative to the data."""
        what = f"tensor {name}"
        num_dimensions = self.scalar("<u4", what)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._damaged(what)
        shape = tuple(reversed(self._array("<u8", num_dimensions, what)))
        number = self.scalar("<u4", what)
        if number not in {item.value for item in GGMLQuantizationType}:
            raise CheckpointError(f"{self.path}: {what} is of type {number}, which the gguf package does not know")
        kind = GGMLQuantizationType(number)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        num_elements = math.prod(shape)
        if num_elements == 0 or shape[-1] % block_size:
            raise self._damaged(what)
        offset = self.scalar("<u8", what)
        return GgufTensor(shape, kind, offset, num_elements // block_size * block_bytes)

    def _value_type(self, what: str) -> GGUFValueType:
        number = self.scalar("<u4", what)
        if number not in {item.value for item in GGUFValueType}:
            raise self._damaged(what)
        return GGUFValueType(number)

    def _array(self, dtype: str, length: int, what: str) -> list[Any]:
        item = np.dtype(dtype)
        numbers: npt.NDArray[Any] = np.frombuffer(self._take(length * item.itemsize, what), item)
        if item == np.float32:
            # The shortest decimal, so that 1e-05 does not come back as 9.999999747378752e-06.
            return [float(str(number)) for number in numbers]
        values: list[Any] = numbers.tolist()
        return values

    def _take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > len(self._data) - self.offset:
            raise self._damaged(what)
        taken = self._data[self.offset : self.offset + num_bytes]
        self.offset += num_bytes
        return taken

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the header is damaged or cut off at {what}; fetch the file again")
