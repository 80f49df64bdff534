"""The end-to-end phase: the scales of a whole quantized network learn to reproduce the dense network's logits.

The codes stay as they are, and so does everything else that was trained layer by layer (EfficientQAT's second phase,
arXiv 2407.11062, trains the same parameters, on text instead of logits). The loss is the Kullback-Leibler divergence of
the quantized network's next-token distribution from the dense one's, in nats per token.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..llama.model import head_logits
from .linear import TrainableLinear, by_path
from .loop import Training, TrainingBatch, TrainingResult

_LOGIT_ROWS = 128
_HEAD_ROWS = 4096


class ScaleTrainer:
    """Trains the scales of all linear layers of a network at once; their modules are changed in place.

    Args:
        linears: by module path, with codes that do not change.
        norm: the final norm.
        head: (vocab_size, hidden_size), stored as it is served.
        config: its end-to-end settings, and on how many batches the loss is checked.
        precision: dtype of the product that takes the gradient back through the head; logits are float32 in any case.
    """

    def __init__(
        self,
        linears: Mapping[str, TrainableLinear],
        norm: nn.Module,
        head: Tensor,
        config: TrainingConfig,
        *,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._linears = by_path(linears)
        self._norm = norm
        self._head = head
        self._config = config
        self._precision = precision

    def train(
        self,
        batches: Sequence[TrainingBatch],
        generator: torch.Generator,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainingResult:
        """Take every batch ``end_to_end_epochs`` times, and keep the best state seen.

        Args:
            batches: inputs are the embedded tokens, targets the dense network's hidden states before the final norm.
            generator: of the order, on the CPU.
            on_step: is told (done, total) after each step.

        Returns:
            Divergences in nats per token.

        Raises:
            CalibrationError: no batch, or a divergence that is not finite, before the first step or in one.
        """
        config = self._config
        parameters = [parameter for parameter in self._linears.parameters() if parameter.requires_grad]
        groups = [{"params": parameters, "lr": config.end_to_end_learning_rate}]
        training = Training(self._linears, self, groups, config.end_to_end_epochs, config, "the end-to-end phase")
        return training.run(batches, generator, on_step)

    def backward(self, batch: TrainingBatch, progress: float) -> float:
        """Gradients of the divergence; see ``Objective``."""
        normed = self._norm(batch.run(use_checkpointing=True))
        divergence, gradient = self._divergence(normed.detach(), batch.targets)
        normed.backward(gradient)
        return divergence

    def measure(self, batch: TrainingBatch) -> float:
        """The divergence; see ``Objective``."""
        return self._divergence(self._norm(batch.run(use_checkpointing=False)), batch.targets)[0]

    def project(self) -> None:
        """Scales are free; see ``Objective``."""

    @torch.no_grad()
    def _divergence(self, normed: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """Mean divergence over tokens, and its gradient by ``normed`` (num_tokens, hidden_size), some rows at a time.

        The gradient by the logits is the difference of the two distributions: no logits are kept for a way back.
        """
        teacher = self._norm(targets.to(normed.device))
        gradient, total = torch.zeros_like(normed), 0.0
        for start in range(0, len(normed), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            # Both at once: the head is upcast for as many rows as there are.
            logits = head_logits(torch.cat([teacher[rows], normed[rows]]), self._head)
            wanted, given = logits.log_softmax(-1).chunk(2)
            total += float((wanted.exp() * (wanted - given)).sum())
            difference = given.exp_().sub_(wanted.exp_())
            for first in range(0, len(self._head), _HEAD_ROWS):
                columns = slice(first, first + _HEAD_ROWS)
                gradient[rows] += difference[:, columns].to(self._precision) @ self._head[columns].to(self._precision)
        return total / len(normed), gradient.div_(len(normed))
