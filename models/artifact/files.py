"""Files that are complete or absent: temporary name, fsync, rename."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .format import FileRecord

HASH_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it takes the name ``path`` when the block ends without an error, else it is removed.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write ``data`` to ``path``, complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(data)
    return record_of(data)


def record_of(data: bytes) -> FileRecord:
    """The record of a file with content ``data``."""
    return FileRecord(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def hash_file(path: Path) -> FileRecord:
    """Record of the file as it is on disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(num_bytes=file.tell(), sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
