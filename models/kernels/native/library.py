"""Find the native kernel library and load it, or say why there is none.

The library is one file for every processor of an architecture. It is looked for at the path that the environment
names; else beside this package, where a wheel or `make native` puts it; else among the files of the installed
distribution, where an editable install puts it. A machine without a C++ compiler has a note with the reason there.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from .environment import NativeEnvironment
from .structs import ABI_VERSION

DISTRIBUTION = "qerve"
PACKAGE_FOLDER = Path("models", "kernels")
LIBRARY_NAME = "_qerve_cpu.so"
NOTE_NAME = "_qerve_cpu.missing"
_TEXT_BYTES = 1024


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library.

    isa:           the instruction set to run: the one asked for, else the best one here
    compiled_isas: every set it holds kernels for, the preferred one first
    """

    path: Path
    handle: ctypes.CDLL
    isa: str
    compiled_isas: tuple[str, ...]


def load_library(environment: NativeEnvironment, folders: Sequence[Path] | None = None) -> NativeLibrary | str:
    """The native library, or the reason why there is none, written for the user.

    Args:
        environment: the operator's choices.
        folders: where to look, in this order; None: the places that the module's description names.
    """
    places = tuple(library_folders()) if folders is None else tuple(folders)
    path = environment.library_path or _first_file(places, LIBRARY_NAME)
    if path is None:
        return _why_missing(places)
    try:
        handle = ctypes.CDLL(str(path.absolute()))
        version = _declare(handle).qerve_abi_version()
    except OSError as error:
        return f"the native kernel library cannot be loaded: {error}"
    except AttributeError:
        return f"{path} is not qerve's native kernel library, or of another version: install qerve again"
    if version != ABI_VERSION:
        return f"{path} has interface version {version}, this qerve needs {ABI_VERSION}: {_how_to_build()}"
    return _choose_isa(path, handle, environment.isa)


def library_folders() -> Iterator[Path]:
    """Folders that may hold the library or the note: beside this package, then the installed distribution's."""
    yield Path(__file__).resolve().parents[1]
    try:
        yield Path(str(distribution(DISTRIBUTION).locate_file(PACKAGE_FOLDER)))
    except PackageNotFoundError:
        return


def _first_file(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _why_missing(folders: Sequence[Path]) -> str:
    note = _first_file(folders, NOTE_NAME)
    reason = f" ({note.read_text(encoding='utf-8').strip()})" if note is not None else ""
    return f"the native kernels are not built{reason}: {_how_to_build()}"


def _how_to_build() -> str:
    return "install qerve again with a C++ compiler present, or run `make native` in a checkout"


def _declare(handle: ctypes.CDLL) -> ctypes.CDLL:
    handle.qerve_abi_version.argtypes = ()
    handle.qerve_abi_version.restype = ctypes.c_int32
    handle.qerve_isa_choose.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32)
    handle.qerve_isa_choose.restype = ctypes.c_char_p
    handle.qerve_isa_compiled.argtypes = (ctypes.c_char_p, ctypes.c_int32)
    handle.qerve_isa_compiled.restype = None
    return handle


def _choose_isa(path: Path, handle: ctypes.CDLL, forced: str | None) -> NativeLibrary | str:
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    chosen = handle.qerve_isa_choose(None if forced is None else forced.encode(), text, _TEXT_BYTES)
    if chosen is None:
        origin = "" if forced is None else "QERVE_CPU_ISA: "
        return f"{origin}{text.value.decode(errors='replace')}"
    handle.qerve_isa_compiled(text, _TEXT_BYTES)
    return NativeLibrary(path, handle, chosen.decode(), tuple(text.value.decode().split(", ")))
