"""Is there an NVIDIA driver? Asked without PyTorch, which takes seconds to import: mistakes are answered at once."""

import ctypes
import sys
from collections.abc import Callable

_LIBRARIES = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}


def driver_obstacle(load: Callable[[str], object] = ctypes.CDLL, platform: str = sys.platform) -> str | None:
    """Why there can be no CUDA device here; None: there is a driver, and PyTorch knows the rest.

    Args:
        load: loads a library by its name; OSError: it cannot.
        platform: as ``sys.platform``.
    """
    name = _LIBRARIES.get(platform)
    if name is None:
        return f"there is no CUDA for {platform}"
    try:
        load(name)
    except OSError:
        return f"there is no NVIDIA driver here ({name} cannot be loaded)"
    return None
