"""CUDA graphs behind ``GraphDevice``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_WARM_UPS = 2
"""Runs before a recording: kernels are compiled and libraries get their workspaces, which must not happen within it."""


@dataclass(frozen=True, slots=True)
class CudaRecordedStep:
    """A captured graph and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


class CudaGraphDevice:
    """Captures on a stream of its own, into one pool of ``device``'s memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._free_before = torch.cuda.mem_get_info(device)[0]

    def record(self, run: Callable[[], Tensor]) -> CudaRecordedStep:
        """See ``GraphDevice``."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may use the device meanwhile: what they do must not fail the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return CudaRecordedStep(graph, output)

    @property
    def num_bytes(self) -> int:
        """What is less free than before the first recording: the pool, and what the driver keeps of the graphs."""
        return max(self._free_before - torch.cuda.mem_get_info(self._device)[0], 0)
