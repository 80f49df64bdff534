"""What a process that serves an artifact will have resident in host memory, from its files' descriptions alone.

The interpreter and the libraries take what they take whatever is served: measured, once, with Python 3.11 and PyTorch
2.13 for processors on x86-64. A PyTorch with CUDA maps more. The rest follows from the artifact.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.reader import Description
from ..budget import Choice
from ..llama.config import LlamaConfig
from .footprint import kv_cache_bytes, resident_bytes

INTERPRETER_BYTES = 186_000_000
LIBRARY_BYTES = 109_000_000
TOKENIZER_RATIO = 4.0
"""Bytes of memory per byte of ``tokenizer.json``."""
OBJECT_BYTES = 10_000_000
"""The manifest, tables of the vocabulary's texts, requests."""
STEP_ROWS = 512
LOGIT_ROWS = 64
LOGIT_COPIES = 4
"""Of the rows that are scored together: logits, their softmax, and as much that the heap keeps of earlier ones."""
_FLOAT = 4
_KV_TOKENS = 1024


MIB = 2**20


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Resident bytes by component, serving on the processor.

    kv_cache_per_1024: what 1024 tokens add, of those that the key-value cache holds or remembers; it grows to its whole
        size in time
    """

    interpreter: int
    libraries: int
    tokenizer: int
    weights: int
    objects: int
    workspace: int
    logits: int
    kv_cache_per_1024: int

    @property
    def loaded_bytes(self) -> int:
        """When it is loaded and has answered nothing."""
        return self.interpreter + self.libraries + self.tokenizer + self.weights + self.objects

    def used_bytes(self, num_cached_tokens: int) -> int:
        """When it has answered all kinds of requests, and the cache has ``num_cached_tokens``."""
        cached = self.kv_cache_per_1024 * num_cached_tokens // _KV_TOKENS
        return self.loaded_bytes + self.workspace + self.logits + cached

    def rows(self) -> dict[str, str]:
        """Name -> value of the summary table."""
        return {
            "memory when just served": f"about {self.loaded_bytes / MIB:.0f} MiB resident",
            "memory in use": f"about {self.used_bytes(0) / MIB:.0f} MiB, and {self.kv_cache_per_1024 / MIB:.1f} MiB "
            "per 1024 tokens in the key-value cache",
        }


def predict_host_memory(artifact: Path) -> HostMemory:
    """For the artifact in directory ``artifact``, run by the kernels that are chosen by themselves.

    Raises:
        ArtifactError: it is damaged.
    """
    description = Description.read(artifact)
    manifest, network, device = description.manifest, description.config, torch.device("cpu")
    choices = {
        path: Choice(record.scheme, record.rank, record.effective_bits * record.in_features * record.out_features)
        for path, record in manifest.linears.items()
    }
    tokenizer = manifest.files.get("tokenizer.json")
    return HostMemory(
        interpreter=INTERPRETER_BYTES,
        libraries=LIBRARY_BYTES,
        tokenizer=0 if tokenizer is None else round(TOKENIZER_RATIO * tokenizer.num_bytes),
        weights=resident_bytes(network, manifest.build, choices, device),
        objects=OBJECT_BYTES,
        workspace=_workspace_bytes(network),
        logits=_FLOAT * LOGIT_ROWS * network.vocab_size * LOGIT_COPIES,
        kv_cache_per_1024=kv_cache_bytes(network, device),
    )


def _workspace_bytes(network: LlamaConfig) -> int:
    """What operators hand to each other for one step."""
    heads = (2 * network.num_attention_heads + 2 * network.num_key_value_heads) * network.head_dim
    return _FLOAT * STEP_ROWS * (network.hidden_size + heads + network.intermediate_size)
