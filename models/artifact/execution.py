"""How a loaded network is to run, as an operator chooses it, and how it then does."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import KernelError
from ..kernels.base import KernelBackend
from ..kernels.native.backend import NativeBackend
from ..kernels.native.describe import describe_native
from ..kernels.native.inputs import ActivationBits
from ..kernels.triton.backend import TritonBackend
from ..llama.attention_choice import choose_attention
from ..llama.fuse import Unfused, fuse
from ..llama.model import LlamaForCausalLM
from ..llama.native import NativeLlama
from ..llama.network import Network
from ..llama.paged_network import PagedLlama
from ..types import QuantizedWeight

logger = logging.getLogger("qerve.load")

Activations: TypeAlias = Literal["auto", "8", "16"]
CacheDtype: TypeAlias = Literal["auto", "fp16", "int8"]
_CACHE_DTYPES = {"auto": torch.float16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What an operator may choose about the kernels.

    backend:        ``auto``, or the name of the kernel backend to run every layer
    activations:    bits to which the native kernels round inputs that the artifact leaves unquantized; auto: 8
    kv_cache_dtype: of the key-value cache; auto: fp16 on the native kernels, else the type of the activations
    """

    backend: str = "auto"
    activations: Activations = "auto"
    kv_cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("activations", self.activations, get_args(Activations)),
            ("kv_cache_dtype", self.kv_cache_dtype, get_args(CacheDtype)),
        ):
            if value not in known:
                raise KernelError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")

    @property
    def activation_bits(self) -> ActivationBits:
        """Bits for the native backend."""
        return 16 if self.activations == "16" else 8

    @property
    def native_cache_dtype(self) -> torch.dtype:
        """Of the native kernels' key-value cache: float16 or int8."""
        return _CACHE_DTYPES[self.kv_cache_dtype]


@dataclass(frozen=True, slots=True)
class Execution:
    """How a network runs.

    native:  what the native and the Triton kernels are here, in words; empty where they were not asked for
    unfused: why they do not run all of it as one list of operators; None: they do
    attention: which kernels attend on a GPU and why others do not, in words; empty elsewhere
    """

    native: dict[str, str]
    unfused: str | None
    attention: dict[str, str] = field(default_factory=dict)

    def rows(self) -> dict[str, str]:
        """Name -> value of a table."""
        network = "one list of native operators" if self.unfused is None else f"layer by layer: {self.unfused}"
        return self.native | {"network": network} | self.attention


def run_natively(
    model: LlamaForCausalLM,
    embedding: Tensor | QuantizedWeight,
    backends: Sequence[KernelBackend],
    options: RunOptions,
) -> tuple[Network, Execution]:
    """``model`` over the native kernels as one list of operators, over a paged cache on a GPU, or as it is."""
    native = describe_backends(backends)
    try:
        return fuse(model, embedding, options.native_cache_dtype), Execution(native, None)
    except Unfused as reason:
        unfused = str(reason)
    if options.kv_cache_dtype != "auto":
        model.cache_dtype = _CACHE_DTYPES[options.kv_cache_dtype]
    if model.device.type != "cuda":
        return model, Execution(native, unfused)
    choice = choose_attention(model.config, model.device, model.dtype)
    return PagedLlama(model, choice), Execution(native, unfused, choice.rows())


def describe_backends(backends: Sequence[KernelBackend]) -> dict[str, str]:
    """What the native and the Triton one of ``backends`` are here; empty without them."""
    rows: dict[str, str] = {}
    for backend in backends:
        if isinstance(backend, NativeBackend):
            rows |= describe_native(backend)
        elif isinstance(backend, TritonBackend):
            rows["triton"] = backend.environment.describe()
    return rows


def warn_if_missing(backends: Sequence[KernelBackend], device: torch.device) -> None:
    """One warning where kernels for ``device`` would run, were they there: all still works, several times slower."""
    for backend in backends:
        if isinstance(backend, NativeBackend) and isinstance(backend.runtime, str) and device.type == "cpu":
            logger.warning("running without native kernels, several times slower: %s", backend.runtime)
        if isinstance(backend, TritonBackend) and device.type == "cuda":
            reason = backend.environment.why_not(device)
            if reason is not None:
                logger.warning("running without Triton kernels, several times slower: %s", reason)


def resident_bytes(network: Network, prepared: dict[str, int]) -> dict[str, int]:
    """Bytes in memory by component: of a fused network its own account, else what the layers' backends keep."""
    return network.weights.resident_bytes if isinstance(network, NativeLlama) else prepared
