"""The loop that all training shares: steps in a seeded order, a cosine schedule, the best state kept."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from ..config import TrainingConfig
from ..errors import CalibrationError
from .linear import TrainableLinear

_BETAS = (0.9, 0.95)

Block = Callable[[Tensor], Tensor]
"""Hidden states (num_tokens, hidden_size) float32 through one decoder layer."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One step's hidden states, each (num_tokens, hidden_size) float32, and how the decoder layers run on them.

    They may be in the host's memory; the blocks take them to their device.

    inputs:  of the first layer in training, from quantized layers
    targets: what the dense network's layers put out after the last of them
    blocks:  the layers in training, in order
    """

    inputs: Tensor
    targets: Tensor
    blocks: Sequence[Block]

    def run(self, *, use_checkpointing: bool) -> Tensor:
        """What the layers in training put out, (num_tokens, hidden_size)."""
        # A clone, since what comes out of inference mode may not be kept for the way back.
        hidden = self.inputs.clone()
        for block in self.blocks:
            if use_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return hidden


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Losses without penalties on the batches that were checked, and how many steps were taken."""

    loss_before: float
    loss_after: float
    num_steps: int


class Objective(Protocol):
    """What a training minimises."""

    def backward(self, batch: TrainingBatch, progress: float) -> float:
        """Add the gradients of the loss on ``batch`` to the parameters; ``progress`` is 0 to 1. Returns the loss."""
        ...

    def measure(self, batch: TrainingBatch) -> float:
        """The loss on ``batch`` without penalties, and without gradients."""
        ...

    def project(self) -> None:
        """Bring parameters back to where they may be, after a step."""
        ...


@dataclass(frozen=True, slots=True)
class Training:
    """One run of the loop over ``module``, which is changed in place.

    groups:     parameter groups of the optimizer
    num_epochs: times that every batch is taken
    where:      what is trained, for messages
    """

    module: nn.Module
    objective: Objective
    groups: list[dict[str, Any]]
    num_epochs: int
    config: TrainingConfig
    where: str

    def run(
        self,
        batches: Sequence[TrainingBatch],
        generator: torch.Generator,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainingResult:
        """Take every batch ``num_epochs`` times, in an order of ``generator``, and keep the best state seen.

        Args:
            batches: of the calibration set.
            generator: of the order, on the CPU.
            on_step: is told (done, total) after each step.

        Raises:
            CalibrationError: no batch, or a loss that is not finite, before the first step or in one.
        """
        if not batches:
            raise CalibrationError(f"{self.where}: training needs calibration sequences")
        before = best = self._check(batches)
        self._require_finite(before, "before training")
        num_steps = self.num_epochs * len(batches) if self.groups else 0
        if num_steps == 0:
            return TrainingResult(before, before, 0)
        optimizer = torch.optim.AdamW(self.groups, betas=_BETAS, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, num_steps)
        num_checks = self.config.num_checks
        check_steps = {round(num_steps * done / num_checks) for done in range(1, num_checks)}
        kept = self._state()
        for step, index in enumerate(self._order(len(batches), generator), start=1):
            optimizer.zero_grad()
            loss = self.objective.backward(batches[index], step / num_steps)
            self._require_finite(loss, f"in step {step} of {num_steps}, calibration batch {index}")
            optimizer.step()
            schedule.step()
            self.objective.project()
            if step in check_steps or step == num_steps:
                reached = self._check(batches)
                if reached < best:
                    best, kept = reached, self._state()
            if on_step is not None:
                on_step(step, num_steps)
        self.module.load_state_dict(kept)
        return TrainingResult(before, best, num_steps)

    @property
    def linears(self) -> list[TrainableLinear]:
        """What is trained."""
        return [module for module in self.module.modules() if isinstance(module, TrainableLinear)]

    @torch.no_grad()
    def _check(self, batches: Sequence[TrainingBatch]) -> float:
        """Mean loss over evenly spaced batches, the same every time."""
        count = min(len(batches), self.config.num_check_batches)
        chosen = [batches[index * len(batches) // count] for index in range(count)]
        with ExitStack() as stack:
            for linear in self.linears:
                stack.enter_context(linear.frozen())
            return sum(self.objective.measure(batch) for batch in chosen) / count

    def _require_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise CalibrationError(
                f"{self.where}: the loss {when} is {loss}; look for inf or nan in the activations of the checkpoint, "
                "and calibrate in float32. If it came up in the training only, lower the learning rate"
            )

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy(self.module.state_dict())

    def _order(self, num_batches: int, generator: torch.Generator) -> list[int]:
        orders = (torch.randperm(num_batches, generator=generator) for _ in range(self.num_epochs))
        return [int(index) for order in orders for index in order]
