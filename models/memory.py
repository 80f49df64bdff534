"""How much memory this process holds, sampled while work is under way."""

import ctypes
import mmap
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil
from torch import Tensor

SAMPLE_SECONDS = 0.005
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_THRESHOLD = 1 << 25
_PAGE_MAP = Path("/proc/self/pagemap")
_PAGES_AT_ONCE = 1 << 17
_PROCESS_STATUS = Path("/proc/self/stat")
_HEAP_START = 44
"""Index of ``start_brk`` among the fields behind the command's name."""


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


def map_large_blocks() -> None:
    """Let glibc give every block of a megabyte or more pages of its own, which go back to the system when it is freed.

    By default the size from which it does so grows to 32 MB with the blocks that come and go, and a build holds half
    as much again as it uses. Costs page faults; for the whole process, so it is for programs to call, not libraries.
    """
    _set_option(_M_MMAP_THRESHOLD, 1 << 20)


def keep_large_blocks() -> None:
    """Let glibc keep the pages of freed blocks below 32 MB, its limit, until ``return_freed_memory`` is called.

    The opposite of ``map_large_blocks``, for work that takes and frees the same megabytes thousands of times: a step of
    training takes a quarter less time without their page faults. For the whole process as well.
    """
    _set_option(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    _set_option(_M_TRIM_THRESHOLD, 1 << 30)


def share_one_heap() -> None:
    """Let all threads take memory from the same heap, where glibc would give each one its own and never join them.

    The heaps of a server's worker threads fill up with fragments for hours. For the whole process, before it has
    threads.
    """
    _set_option(_M_ARENA_MAX, 1)


def _set_option(name: int, value: int) -> None:
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
        if set_option is not None:
            set_option(name, value)


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


def resident_tensor_bytes(tensor: Tensor) -> int | None:
    """Bytes of the pages of ``tensor`` (contiguous, in host memory) that are resident; None: this system does not say.

    Memory that was allocated and never touched is not.
    """
    return _resident_bytes(tensor.data_ptr(), tensor.nbytes)


def free_heap_bytes() -> int | None:
    """Bytes of glibc's heap that nobody uses and that are resident all the same; None: this is not glibc.

    Of the main heap, which is all there is after ``share_one_heap``.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    account = getattr(library, "mallinfo2", None)
    try:
        start = int(_PROCESS_STATUS.read_text(encoding="ascii").rpartition(")")[2].split()[_HEAP_START])
    except (OSError, ValueError):
        return None
    if account is None or library is None or not start:
        return None
    account.restype, library.sbrk.restype = _HeapAccount, ctypes.c_void_p
    resident = _resident_bytes(start, library.sbrk(0) - start)
    return None if resident is None else max(0, resident - account().uordblks)


class _HeapAccount(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``uordblks`` is what is in use of the heaps."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip
    uordblks: int


def _resident_bytes(address: int, num_bytes: int) -> int | None:
    """Bytes of the resident pages among those of ``num_bytes`` from ``address`` on; None: this system does not say."""
    page = mmap.PAGESIZE
    start = address // page
    num_left = -(-(address + num_bytes) // page) - start if num_bytes else 0
    num_resident = 0
    try:
        with _PAGE_MAP.open("rb", buffering=0) as pages:  # 64 bits a page, the highest one set where it is present
            pages.seek(start * 8)
            while num_left > 0:
                entries = np.frombuffer(pages.read(8 * min(num_left, _PAGES_AT_ONCE)), np.uint64)
                if not len(entries):
                    return None
                num_resident += int(np.count_nonzero(entries >> np.uint64(63)))
                num_left -= len(entries)
    except OSError:
        return None
    return num_resident * page


def directory_bytes(directory: Path) -> int:
    """Total size of the files in ``directory`` (not in its sub-directories)."""
    return sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file())
