"""How long work on a GPU takes: events on its stream, and caches that hold nothing of the work before."""

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

_WARM_UP = 3
_FLUSH_TIMES = 4


class DeviceClock(Protocol):
    """Times calls that only enqueue work."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Median time of one ``call`` on the device, its operands in memory and not in a cache."""
        ...


class CudaClock:
    """CUDA events around each call; a buffer larger than the L2 cache is written before it, outside the measured time.

    Args:
        device: a CUDA device.
        cuda: ``torch.cuda``, or what stands in for it.
        repeats: calls that count.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, repeats: int = 20) -> None:
        self._cuda = cuda
        self._device = device
        self._repeats = repeats
        l2 = int(cuda.get_device_properties(device).L2_cache_size)
        self._flushed = torch.empty(_FLUSH_TIMES * l2, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """See ``DeviceClock``."""
        for _ in range(_WARM_UP):
            call()
        pairs = []
        for _ in range(self._repeats):
            self._flushed.zero_()
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self._cuda.synchronize(self._device)
        milliseconds = [float(start.elapsed_time(end)) for start, end in pairs]
        return statistics.median(milliseconds) / 1e3
