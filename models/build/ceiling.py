"""A ceiling on what a build holds in the host's memory: checked before any weight is read."""

from dataclasses import dataclass

import torch

from ..config import BuildConfig
from ..errors import SchemeError
from ..llama.config import LlamaConfig
from ..memory import anonymous_bytes
from .device_footprint import device_memory
from .footprint import hidden_bytes
from .recipe import required_statistics
from .training_footprint import statistics_bytes

_GIB = 1 << 30
_LIBRARIES = 1 << 28
"""What libraries take for themselves once they compute: buffers of matrix products and decompositions, code."""
_ROWS = 1 << 28
"""What passes through the host's memory on its way to a device: one matrix, widened."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What a build holds in the host's memory at most, mapped files aside.

    program: before it starts, and what libraries will take
    phase:   the part of the build that takes most, in words
    working: bytes that it takes
    hidden:  hidden states of the calibration set, where they are kept in memory
    held:    why they cannot be on disk; None: they can
    """

    program: int
    phase: str
    working: int
    hidden: int
    held: str | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.program + self.working + self.hidden

    @property
    def least(self) -> int:
        """The same with the hidden states on disk, where they can be."""
        return self.total if self.held is not None else self.program + self.working

    def must_spill(self, max_bytes: int) -> bool:
        """Whether the hidden states have to be on disk to stay below ``max_bytes``.

        Raises:
            SchemeError: even that is not enough, with what takes most.
        """
        if self.total <= max_bytes:
            return False
        if self.least > max_bytes:
            hidden = "hidden states of the calibration set on disk"
            if self.held is not None:
                hidden = f"{_gib(self.hidden)} of hidden states, which stay in memory since {self.held}"
            raise SchemeError(
                f"max_memory {_gib(max_bytes)}: this build takes about {_gib(self.least)}: {_gib(self.working)} while "
                f"{self.phase}, {_gib(self.program)} for the program and its libraries, {hidden}; raise "
                "max_memory, take fewer tokens at a time (batch_size, sequence_length), or a method that needs less"
            )
        return True


def memory_need(network: LlamaConfig, config: BuildConfig, device: torch.device) -> MemoryNeed:
    """What building ``network`` by ``config`` on ``device`` holds in the memory of this machine, at most."""
    if device.type == "cpu":
        phases = {phase.value: size for phase, size in device_memory(network, config, device).items()}
    else:
        phases = {"keeping statistics": statistics_bytes(network, config) + _ROWS}
    phase = max(phases, key=lambda name: phases[name])
    program = anonymous_bytes() + _LIBRARIES
    return MemoryNeed(program, phase, phases[phase], hidden_bytes(network, config), _held(config))


def _held(config: BuildConfig) -> str | None:
    """Why hidden states are in memory at some time whatever is chosen."""
    reasons = {
        "flattening and permuting look at all of them first": config.transform.flatten is not None
        or config.transform.permute,
        "target bits are planned with them": config.budget is not None,
        "gradients are taken with them": any(it.needs_gradients for it in required_statistics(config)),
        "scales are trained end to end with them": config.training.end_to_end_epochs > 0,
        "several layers are trained together": config.training.num_blocks > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
