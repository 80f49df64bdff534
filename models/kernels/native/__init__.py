"""The native CPU kernels: how their library is found, and how many threads they get."""

from .environment import NativeEnvironment
from .library import NativeLibrary, load_library
from .threads import ThreadChoice, choose_num_threads

__all__ = ["NativeEnvironment", "NativeLibrary", "ThreadChoice", "choose_num_threads", "load_library"]
