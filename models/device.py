"""What a device computes well in."""

from collections.abc import Mapping

import torch

_FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Instructions that multiply bfloat16 matrices: two of x86-64, one of Arm."""

_BFLOAT16_CAPABILITY = (8, 0)
"""From which compute capability on a GPU multiplies bfloat16 matrices."""


def default_dtype(device: torch.device) -> torch.dtype:
    """The floating-point type in which ``device`` runs a network fastest without losing quality.

    bfloat16 on CUDA (float16 where the card is too old for it), and on processors that have instructions for it;
    float32 elsewhere: there bfloat16 products are correct but emulated. A PyTorch that cannot tell (older than its
    ``get_capabilities``) gets float32.
    """
    if device.type == "cuda":
        is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _BFLOAT16_CAPABILITY
        return torch.float16 if is_old else torch.bfloat16
    if device.type == "cpu" and _has_fast_bfloat16():
        return torch.bfloat16
    return torch.float32


def _has_fast_bfloat16() -> bool:
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    is_used = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return is_used and any(bool(capabilities.get(name)) for name in _FAST_BFLOAT16)
