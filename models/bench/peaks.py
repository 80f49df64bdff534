"""What the machine can do at most: memory read by all threads, integer multiply-adds in registers."""

import time
from collections.abc import Callable, Iterator

import torch

from ..kernels.native.environment import NativeEnvironment
from ..kernels.native.library import load_library
from ..kernels.native.runtime import Runtime
from .probe import BYTES_PER_SECOND, MULTIPLY_ADDS_PER_SECOND, Probe

READ = "read bandwidth"
MULTIPLY = "multiply-adds"
MAX_READ_BYTES = 1 << 30
"""A buffer this large is in no cache: a larger one reads no slower."""
_LEAST_READ_BYTES = 1 << 29
_COMPARED_ISAS = ("avx512-vnni", "avx-vnni")
_FIRST_ITERATIONS = 10_000
SAMPLE_SECONDS = 0.03
"""Of one measurement of multiply-adds, at least."""
_GROWTH = 4


def multiply_metric(isa: str) -> str:
    """Metric of the peak of ``isa``."""
    return f"{MULTIPLY}, {isa}"


def read_buffer(num_bytes: int) -> torch.Tensor:
    """(n,) uint8 as large as the weights of a step, ``num_bytes``, or as ``MAX_READ_BYTES``; every page is there."""
    return torch.ones(min(num_bytes, MAX_READ_BYTES), dtype=torch.uint8)


def peak_probes(runtime: Runtime, buffer: torch.Tensor) -> Iterator[Probe]:
    """Read bandwidth over ``buffer``; the integer peak of ``runtime``'s instruction set and of two common others."""
    repeats = -(-_LEAST_READ_BYTES // buffer.nbytes)
    yield Probe((READ,), BYTES_PER_SECOND, lambda: (runtime.peak_read(buffer, repeats),))
    yield _multiply_probe(runtime)
    for isa in _COMPARED_ISAS:
        if isa != runtime.isa and isa in runtime.library.compiled_isas:
            library = load_library(NativeEnvironment(runtime.library.path, isa))
            if not isinstance(library, str):
                yield _multiply_probe(Runtime(library, runtime.threads))


def _multiply_probe(runtime: Runtime) -> Probe:
    return Probe((multiply_metric(runtime.isa),), MULTIPLY_ADDS_PER_SECOND, _multiply_run(runtime))


def _multiply_run(runtime: Runtime) -> Callable[[], tuple[float]]:
    iterations = enough_iterations(runtime.peak_multiply_adds)
    return lambda: (runtime.peak_multiply_adds(iterations),)


def enough_iterations(run: Callable[[int], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """Iterations that ``run`` takes ``SAMPLE_SECONDS`` for, at most four times as long.

    Instruction sets differ by a factor of a thousand, and a sample that is too short measures how threads wake up.
    """
    iterations = _FIRST_ITERATIONS
    while True:
        started = clock()
        run(iterations)
        if clock() - started >= SAMPLE_SECONDS:
            return iterations
        iterations *= _GROWTH
