"""Writing GGUF files through the ``gguf`` package: header first, then one tensor at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

_ANY_TYPE = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name, type, shape, and where its content comes from once it is due."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    content: Callable[[], npt.NDArray[Any]]


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Write a file; contents are made one after the other, so that only one is in memory."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for entry in entries:
        block, num_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
        size = num_bytes
        for length in entry.shape:
            size *= length
        # Of bytes it would take the shape for that of blocks; beside a type of ours, any other will do.
        writer.add_tensor_info(entry.name, entry.shape, _ANY_TYPE, size // block, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.content())
    writer.close()


def _add(writer: Any, key: str, value: object) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
