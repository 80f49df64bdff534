"""The library's context: its worker threads and instruction set, and the calls that go through them.

ctypes lets go of the interpreter's lock while a call runs. A context takes one call at a time: see the lock.
"""

import ctypes
import os
import threading
import weakref
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import lru_cache

from torch import Tensor

from ...errors import KernelError
from .environment import NativeEnvironment
from .library import NativeLibrary, load_library
from .memory import WeightMemory
from .structs import Matrix, Op, Source, Step
from .threads import ThreadChoice, choose_num_threads

_TEXT_BYTES = 1024


class Runtime:
    """Worker threads over the loaded library, and memory for the weights that they read.

    Raises:
        KernelError: the library cannot start them.
    """

    def __init__(self, library: NativeLibrary, threads: ThreadChoice, is_pinned: bool = False) -> None:
        self.library = library
        self.threads = threads
        self.memory = WeightMemory()
        self._calls = _declare(library.handle)
        self._lock = threading.Lock()
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        context = self._calls.qerve_context_create(
            library.isa.encode(), threads.num_threads, int(is_pinned), text, _TEXT_BYTES
        )
        if not context:
            raise KernelError(f"the native kernels cannot start: {_decode(text)}")
        self._context = c_void_p(context)
        self.close = weakref.finalize(self, self._calls.qerve_context_destroy, self._context)

    @property
    def isa(self) -> str:
        """Name of the instruction set that runs."""
        return str(self._calls.qerve_context_isa(self._context).decode())

    @property
    def num_threads(self) -> int:
        """Threads that work on a call, the caller's own included."""
        return int(self._calls.qerve_context_num_threads(self._context))

    def plan(self, source: Source, matrix: Matrix) -> int:
        """Fill in the shape of ``matrix``; bytes that its strips take.

        Raises:
            KernelError: the kernels cannot hold this weight, with the reason.
        """
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        num_bytes = int(self._calls.qerve_pack_plan(ctypes.byref(source), ctypes.byref(matrix), text, _TEXT_BYTES))
        if num_bytes < 0:
            raise KernelError(f"the native kernels cannot pack this weight: {_decode(text)}")
        return num_bytes

    def pack(self, source: Source, matrix: Matrix) -> None:
        """Write the strips of a planned ``matrix``."""
        with self._lock:
            self._calls.qerve_pack(self._context, ctypes.byref(source), ctypes.byref(matrix))

    def run(self, ops: "ctypes.Array[Op]", step: Step) -> None:
        """Take a batch through ``ops``.

        Raises:
            KernelError: the batch or an operator is out of range; nothing was written.
        """
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        with self._lock:
            status = self._calls.qerve_run(self._context, ops, len(ops), ctypes.byref(step), text, _TEXT_BYTES)
        if status:
            raise KernelError(f"the native kernels refused a step: {_decode(text)}")

    def peak_read(self, memory: Tensor, repeats: int = 1) -> float:
        """Bytes per second at which all threads together read ``memory`` (contiguous), each its own share."""
        with self._lock:
            return float(self._calls.qerve_peak_read(self._context, memory.data_ptr(), memory.nbytes, repeats))

    def peak_multiply_adds(self, iterations: int) -> float:
        """8-bit multiply-adds per second of all threads, in registers, with the widest instruction of this set."""
        with self._lock:
            return float(self._calls.qerve_peak_int8(self._context, iterations))


# A cache of what the environment names, not state: the same settings always give the same threads of one library.
@lru_cache(maxsize=4)
def open_runtime(environment: NativeEnvironment) -> Runtime | str:
    """The process's runtime for ``environment``, or the reason why there is none, written for the user."""
    library = load_library(environment)
    if isinstance(library, str):
        return library
    try:
        return Runtime(library, choose_num_threads(environment.num_threads))
    except KernelError as error:
        return str(error)


def default_runtime() -> Runtime | str:
    """``open_runtime`` with the settings in this process's environment.

    Raises:
        KernelError: a setting is malformed.
    """
    return open_runtime(NativeEnvironment.read(os.environ))


def _decode(text: "ctypes.Array[ctypes.c_char]") -> str:
    return text.value.decode(errors="replace")


def _declare(handle: ctypes.CDLL) -> ctypes.CDLL:
    """Argument and result types of every call used here: ctypes would pass 64-bit numbers as 32 bits otherwise."""
    signatures = {
        "qerve_context_create": ((c_char_p, c_int32, c_int32, c_char_p, c_int32), c_void_p),
        "qerve_context_destroy": ((c_void_p,), None),
        "qerve_context_isa": ((c_void_p,), c_char_p),
        "qerve_context_num_threads": ((c_void_p,), c_int32),
        "qerve_pack_plan": ((POINTER(Source), POINTER(Matrix), c_char_p, c_int32), c_int64),
        "qerve_pack": ((c_void_p, POINTER(Source), POINTER(Matrix)), None),
        "qerve_run": ((c_void_p, POINTER(Op), c_int32, POINTER(Step), c_char_p, c_int32), c_int32),
        "qerve_peak_read": ((c_void_p, c_void_p, c_int64, c_int32), c_double),
        "qerve_peak_int8": ((c_void_p, c_int64), c_double),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(handle, name)
        function.argtypes, function.restype = arguments, result
    return handle
