"""Memory for packed weights: large pieces of it at a time, side by side, on large pages where the system has them.

A step reads all weights once, in order. With pages of 4 KiB the first bytes of each wait for its address to be looked
up, and the processor fetches nothing ahead across its end.
"""

import mmap
import threading

import torch
from torch import Tensor

from .structs import ALIGNMENT

_LARGE_PAGE = 2 << 20
_PIECE = 8 * _LARGE_PAGE
_HAS_ADVICE = hasattr(mmap, "MADV_HUGEPAGE")
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class WeightMemory:
    """Hands out memory that lives as long as the tensors over it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._piece = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8 zeros that start on a cache line, behind what was taken before where that is possible."""
        with self._lock:
            if len(self._piece) < num_bytes:
                self._piece = _large_pages(num_bytes)
            taken = self._piece[:num_bytes]
            self._piece = self._piece[-(-num_bytes // ALIGNMENT) * ALIGNMENT :]
            return taken


def _large_pages(num_bytes: int) -> Tensor:
    """At least ``num_bytes`` that start on a large page; what is not written takes no memory."""
    size = -(-max(num_bytes, _PIECE) // _LARGE_PAGE) * _LARGE_PAGE
    memory = mmap.mmap(-1, size + _LARGE_PAGE, **_PRIVATE)
    piece = torch.frombuffer(memory, dtype=torch.uint8)
    start = -piece.data_ptr() % _LARGE_PAGE
    if _HAS_ADVICE:
        memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    return piece[start : start + size]
