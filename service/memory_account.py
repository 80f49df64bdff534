"""What the resident memory of the process is for, each part measured or counted by itself, so that the sum can be held
against what the system says.

    libraries    resident pages of mapped files: code and constants of the libraries
    interpreter  anonymous memory when everything was imported and nothing was loaded
    tokenizer    what its loading added
    weights      as the backends keep them
    kv_cache     pages of the key-value cache that have been touched, as the kernel counts them
    workspace    what operators hand to each other, and tables of positions
    allocator    memory that was freed and that the C library keeps to hand out again

What is left is stacks, tables that are made when they are first asked for, and objects of requests.
"""

from dataclasses import dataclass

import torch

from models.artifact.load import LoadedModel
from models.llama.network import KVCache
from models.memory import free_heap_bytes, resident_tensor_bytes

from .memory import process_memory


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """Resident memory of a process that serves ``loaded`` with ``cache``.

    interpreter_bytes: anonymous memory before anything was loaded; None: nobody looked
    """

    loaded: LoadedModel
    cache: KVCache
    interpreter_bytes: int | None = None

    def components(self) -> dict[str, int]:
        """Bytes by component; what cannot be told here is left out."""
        parts = {
            "libraries": process_memory().get("rss_file"),
            "interpreter": self.interpreter_bytes,
            "tokenizer": self.loaded.tokenizer_bytes,
            "weights": self._weight_bytes(),
            "kv_cache": self._cache_bytes(),
            "workspace": getattr(self.loaded.model, "workspace_bytes", 0),
            "allocator": free_heap_bytes(),
        }
        return {name: size for name, size in parts.items() if size is not None}

    def _weight_bytes(self) -> int:
        """Those that are in host memory."""
        is_on_host = torch.device(self.loaded.model.device).type == "cpu"
        return sum(self.loaded.resident_bytes.values()) if is_on_host else 0

    def _cache_bytes(self) -> int | None:
        sizes = [resident_tensor_bytes(tensor) for tensor in self.cache.tensors if tensor.device.type == "cpu"]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None
