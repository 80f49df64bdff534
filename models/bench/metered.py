"""The native kernels with a stopwatch: what is left of a step's time is Python's."""

import ctypes
import time

from ..kernels.native.runtime import Runtime
from ..kernels.native.structs import Op, Step


class MeteredRuntime(Runtime):
    """A runtime that adds up the seconds inside its steps."""

    seconds = 0.0

    def run(self, ops: "ctypes.Array[Op]", step: Step) -> None:
        """See ``Runtime``."""
        started = time.perf_counter()
        try:
            super().run(ops, step)
        finally:
            self.seconds += time.perf_counter() - started
