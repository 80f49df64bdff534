"""The environment variables of the native kernels, read in this one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import KernelError


@dataclass(frozen=True, slots=True)
class NativeEnvironment:
    """What an operator decides about the native kernels; None: not decided.

    library_path: ``QERVE_CPU_LIBRARY``, the library's file; no other place is looked at
    isa:          ``QERVE_CPU_ISA``, the instruction set: amx, avx512-vnni, avx-vnni, avx2, neon-dotprod or portable
    num_threads:  ``QERVE_NUM_THREADS``, threads that the kernels run on
    """

    library_path: Path | None = None
    isa: str | None = None
    num_threads: int | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> "NativeEnvironment":
        """The settings in ``variables`` (``os.environ``); an empty one counts as not set.

        Raises:
            KernelError: the number of threads is none.
        """
        library_path = variables.get("QERVE_CPU_LIBRARY")
        return cls(
            library_path=Path(library_path) if library_path else None,
            isa=variables.get("QERVE_CPU_ISA") or None,
            num_threads=_num_threads(variables.get("QERVE_NUM_THREADS") or None),
        )


def _num_threads(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 1024):
        raise KernelError(f"QERVE_NUM_THREADS is {text!r}: give a number of threads from 1 to 1024, or leave it unset")
    return int(text)
