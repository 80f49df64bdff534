"""How much memory this process holds, sampled while work is under way."""

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

SAMPLE_SECONDS = 0.005


def anonymous_bytes() -> int:
    """Resident memory of this process without the pages of mapped files, which the system can take back at any time."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def return_freed_memory() -> None:
    """Give the pages of released tensors back to the system.

    glibc keeps freed blocks below its moving threshold (up to 32 MB) for itself; over a whole load or build they would
    add up to a second copy of the model. Takes a fraction of a millisecond.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from other C libraries
        if trim is not None:
            trim(0)


class PeakMemory:
    """Context manager: the largest ``anonymous_bytes`` seen between entry and exit, by sampling in a thread."""

    def __init__(self) -> None:
        self.start_bytes = 0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="qerve-peak-memory", daemon=True)

    @property
    def growth_bytes(self) -> int:
        """Peak above what the process held on entry."""
        return max(self.peak_bytes - self.start_bytes, 0)

    def __enter__(self) -> Self:
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def directory_bytes(directory: Path) -> int:
    """Total size of the files in ``directory`` (not in its sub-directories)."""
    return sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file())
