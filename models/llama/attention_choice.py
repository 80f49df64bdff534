"""Which kernels attend on a GPU: chosen once, when a network is loaded, with the reasons kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch

from ..kernels.paged import PagedAttention, TorchPagedAttention
from ..kernels.triton.environment import TritonEnvironment
from .config import LlamaConfig
from .prefill import FlashAttnPrefill, PrefillAttention, SdpaPrefill

_FLASH_ATTN = "flash_attn"
_FLASH_ATTN_MAX_HEAD_DIM = 256
_TRITON_MAX_HEAD_DIM = 256
_CPU_PROCESSORS = 1
"""Of the interpreter, as far as splits go."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The kernels that attend over the paged cache.

    decode:  for rows of sequences that have few of them in a step
    prefill: for the others
    passed_over: kernels that would have been preferred: name -> reason
    """

    decode: PagedAttention
    prefill: PrefillAttention
    passed_over: dict[str, str] = field(default_factory=dict)

    def rows(self) -> dict[str, str]:
        """Name -> value of a table."""
        rows = {"attention, decode": self.decode.name, "attention, prefill": self.prefill.name}
        return rows | {f"not {name} attention": reason for name, reason in self.passed_over.items()}


def choose_attention(
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    environment: TritonEnvironment | None = None,
    find: Callable[[str], object] = find_spec,
) -> AttentionChoice:
    """The kernels for a network on ``device``.

    Args:
        config: its shape.
        device: where it runs.
        dtype: of its activations.
        environment: what there is of Triton; None: as found.
        find: finds a package by name; None from it: there is none.
    """
    passed_over: dict[str, str] = {}
    decode: PagedAttention = TorchPagedAttention()
    reason = _triton_obstacle(config, device, environment or TritonEnvironment.read())
    if reason is None:
        decode = _triton(config, device)
    else:
        passed_over["triton"] = reason
    prefill: PrefillAttention = SdpaPrefill()
    obstacle = next(_flash_attn_obstacles(config, device, dtype, find), None)
    if obstacle is None:
        prefill = FlashAttnPrefill(import_module(_FLASH_ATTN).flash_attn_varlen_func)
    else:
        passed_over["flash-attn"] = obstacle
    return AttentionChoice(decode, prefill, passed_over)


def _triton_obstacle(config: LlamaConfig, device: torch.device, environment: TritonEnvironment) -> str | None:
    if (reason := environment.why_not(device)) is not None:
        return reason
    if config.head_dim > _TRITON_MAX_HEAD_DIM:
        return f"heads have {config.head_dim} channels, the kernel takes up to {_TRITON_MAX_HEAD_DIM}"
    return None


def _triton(config: LlamaConfig, device: torch.device) -> PagedAttention:
    from ..kernels.triton.paged import TritonPagedAttention, splits_for

    is_cuda = device.type == "cuda"
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else _CPU_PROCESSORS
    return TritonPagedAttention(splits_for(num_processors, config.num_key_value_heads))


def _flash_attn_obstacles(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, find: Callable[[str], object]
) -> Iterator[str]:
    if device.type != "cuda":
        yield f"runs on CUDA devices only, not on {device.type}"
    if find(_FLASH_ATTN) is None:
        yield "the package is not installed"
    if dtype not in {torch.float16, torch.bfloat16}:
        yield f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim > _FLASH_ATTN_MAX_HEAD_DIM or config.head_dim % 8:
        yield (f"heads have {config.head_dim} channels, it takes multiples of 8 up to {_FLASH_ATTN_MAX_HEAD_DIM}")
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        yield "needs compute capability 8.0 or newer"
