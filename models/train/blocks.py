"""Block-wise training: consecutive decoder layers, quantized, learn to put out what the dense ones do.

The inputs are those that the quantized layers before give, the targets come from the dense network, and the layers in
training run as they will be served: codes merged, activations quantized. The loss is

    mean over tokens of |y - t|^2 / |t|^2  +  lam_q rounding  +  lam_o overflow

with the penalties of ``TrainableLinear``, lam_q rising linearly to its full value. Each token counts alike: the
residual stream of a LLaMA has a few tokens so large that they would be all there is to a sum of squares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..reconstruct.qer import INTEGER_MERGES, Qer
from .linear import ActivationClip, TrainableLinear, by_path
from .loop import Training, TrainingBatch, TrainingResult
from .straight import bounded_clip

_LEAST_ENERGY = 1e-2
"""Of a token, as a share of the median in its batch."""


class BlockTrainer:
    """Trains the linear layers of some decoder layers; their modules are changed in place.

    Args:
        linears: what is trained, by module path.
        method: whose options say what is trained.
        config: how.
        where: the decoder layers, for messages.
    """

    def __init__(self, linears: Mapping[str, TrainableLinear], method: Qer, config: TrainingConfig, where: str) -> None:
        self._linears = by_path(linears)
        self._method = method
        self._config = config
        self._where = where

    def train(self, batches: Sequence[TrainingBatch], generator: torch.Generator) -> TrainingResult:
        """Train on ``batches``, in an order of ``generator``.

        Returns:
            Relative errors, as ``relative_error`` has them.

        Raises:
            CalibrationError: no batch, or a loss that is not finite, before the first step or in one.
        """
        num_epochs = self._config.num_epochs
        training = Training(self._linears, self, self._parameter_groups(), num_epochs, self._config, self._where)
        return training.run(batches, generator)

    def backward(self, batch: TrainingBatch, progress: float) -> float:
        """Gradients of the relative error and the penalties; see ``Objective``."""
        outputs = batch.run(use_checkpointing=self._config.use_checkpointing)
        loss = relative_error(outputs, batch.targets)
        for linear in self._linears.values():
            assert isinstance(linear, TrainableLinear)  # noqa: S101 - that is what they were made of
            if linear.penalty_of_rounding is not None:
                loss = loss + self._config.rounding_penalty * progress * linear.penalty_of_rounding
            if linear.penalty_of_overflow is not None:
                loss = loss + self._config.overflow_penalty * linear.penalty_of_overflow
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def measure(self, batch: TrainingBatch) -> float:
        """The relative error; see ``Objective``."""
        return float(relative_error(batch.run(use_checkpointing=False), batch.targets))

    def project(self) -> None:
        """Clip ratios stay ratios; see ``Objective``."""
        for module in self._linears.modules():
            if isinstance(module, ActivationClip):
                module.ratio.data.copy_(bounded_clip(module.ratio, module.scheme))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Factors, scales and clip ratios with their learning rates; a parameter that layers share appears once."""
        config = self._config
        rates = {
            "log_scale": config.scale_learning_rate,
            "ratio": config.clip_learning_rate,
            "lora_up": factor_learning_rate(self._method, config),
            "lora_down": factor_learning_rate(self._method, config),
        }
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._linears.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rates[name.rpartition(".")[2]], []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def factor_learning_rate(method: Qer, config: TrainingConfig) -> float:
    """That of ``config``, or what suits the merge when a step takes one of 128 sequences."""
    if config.learning_rate:
        return config.learning_rate
    merge = method.options.merge
    if merge == "ternary":
        return 0.05
    if merge in INTEGER_MERGES:
        return 0.06
    return 1e-2 if merge == "inside-rounding" else 2e-3


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of ``|y - t|^2 / |t|^2``, both (num_tokens, hidden_size); the smallest tokens count less.

    ``targets`` may be in the host's memory.
    """
    targets = targets.to(outputs.device)
    energy = targets.square().sum(1)
    return ((outputs - targets).square().sum(1) / energy.clamp(min=_LEAST_ENERGY * energy.median())).mean()
