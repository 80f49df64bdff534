"""What there is of Triton here, and on which devices its kernels run; the reason in words where they do not.

Triton is asked about without being imported: `import models` must work, and be quick, where it is not installed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability: bfloat16 tensor cores and asynchronous copies came with it."""


MISSING = "triton is not installed; it comes with the extra: pip install 'qerve[gpu]'"


@dataclass(frozen=True, slots=True)
class TritonEnvironment:
    """version:         of the installed Triton; None: there is none
    is_interpreting: ``TRITON_INTERPRET=1``: kernels run in NumPy on the CPU, for tests. Triton decides when it is
        imported, so the variable must be set before that
    """

    version: str | None
    is_interpreting: bool

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> "TritonEnvironment":
        """Look for an installed Triton; settings from ``variables``."""
        return cls(_installed_version(), variables.get("TRITON_INTERPRET") == "1")

    def describe(self) -> str:
        """The version, or that there is none; for tables."""
        if self.version is None:
            return MISSING
        return f"{self.version}, interpreted on the CPU" if self.is_interpreting else f"{self.version}, on CUDA devices"

    def why_not(self, device: torch.device) -> str | None:
        """Why the kernels do not run on ``device``; None: they do."""
        if device.type not in {"cuda", "cpu"}:
            return f"runs on CUDA devices only, not on {device.type}"
        if device.type == "cpu" and not self.is_interpreting:
            return "runs on CUDA devices only, not on cpu"
        if self.version is None:
            return MISSING
        if device.type == "cpu":
            return None
        obstacle = _cuda_obstacle(device)
        if obstacle is None and self.is_interpreting:
            return "TRITON_INTERPRET=1 runs kernels on the CPU; unset it to use the GPU"
        return obstacle


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA ``device`` as one number, 80 for 8.0; of the interpreter's CPU 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA ``device``; of the interpreter's CPU 4, so that small layers are divided as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _cuda_obstacle(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"{device} is not here: torch finds {torch.cuda.device_count()} CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, it)) for it in (MIN_CAPABILITY, capability))
        return f"needs compute capability {needed} or newer, {torch.cuda.get_device_name(device)} has {found}"
    return None


def _installed_version() -> str | None:
    # torch's builds for CUDA bring Triton under other names of the distribution
    if find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
