"""Whether tests that only a GPU can pass may run here."""

import os

import torch


def why_no_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run; None: they can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here; `make gpu-check` runs this on a machine that has one"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1, so that kernels would run on the CPU: set it to 0, as `make gpu-check` does"
    return None
