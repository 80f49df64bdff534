"""Statistics of gradients: one pass forth and one back through the dense network, a decoder layer's weights at a time.

The loss is the next-token nll in nats, summed over a sequence. Going forth keeps the hidden states between segments of
about sqrt(num_layers) layers; going back runs each segment once more to have those between its layers, then takes every
sequence back through one layer before the layer below it is read. So two square roots of hidden states are alive
instead of one per layer, and the squared weight gradients of a single decoder layer instead of all of them.

The gradient of a weight is ``sum_t g_t^T x_t`` with x the layer's input and g the gradient by its output: both are
picked up on the way, no weight asks for a gradient of its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layers.linear import DenseLinear
from ..llama.batch import Batch
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer, RMSNorm, embed, head_logits
from ..llama.rope import RotaryEmbedding
from ..types import Statistic
from .gradients import GradientAccumulator, GradientStatistics

__all__ = ["GradientStatistics", "collect_gradients", "not_rotated"]

_LOGIT_ROWS = 64
_HEAD_ROWS = 1024


BlockOf: TypeAlias = Callable[[str, int], int]
"""Module path and in_features of a linear layer -> width of the Hadamard blocks of its input; 0: not rotated."""


def not_rotated(_path: str, _in_features: int) -> int:
    """Rotation block of a network whose inputs are not rotated: 0."""
    return 0


def collect_gradients(
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device,
    requires: frozenset[Statistic],
    rotation_block_of: BlockOf = not_rotated,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, GradientStatistics]:
    """Gradient statistics of every linear layer by module path.

    Args:
        checkpoint: the dense network; runs in float32, embedding and head at 16 bits as an artifact keeps them.
        tokens: (num_sequences, length) int64, at least two tokens each.
        device: where to compute.
        requires: which of ``fisher`` and ``output_gradient`` to take; others are ignored.
        rotation_block_of: module path and in_features -> width of the Hadamard blocks in whose coordinates the weight
            is quantized; 0: its own.
        on_progress: is told (done, total) after each decoder layer on the way back.

    Raises:
        CalibrationError: no sequence, sequences of one token, or a gradient that is not finite.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"gradients need sequences of at least 2 tokens, not tokens of shape {tuple(tokens.shape)}; raise "
            "num_gradient_sequences or sequence_length"
        )
    return _Pass(checkpoint, tokens, device, requires, rotation_block_of, on_progress=on_progress).run()


class _Pass:
    """One pass forth and back; hidden states and their gradients are lists of (length, hidden_size), per sequence."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        device: torch.device,
        requires: frozenset[Statistic],
        rotation_block_of: BlockOf,
        *,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._network = checkpoint.config
        self._weights = DenseWeights(checkpoint, torch.float32, device)
        self._tokens = tokens.to(device)
        self._requires = requires
        self._rotation_block_of = rotation_block_of
        self._on_progress = on_progress
        self._num_done = 0
        # All sequences are equally long: they share positions and spans, and no layer looks at token ids.
        self._batch = Batch.uncached(tokens[:1], device)
        self._rotary = RotaryEmbedding(self._network, device)(self._batch, torch.float32)

    def run(self) -> dict[str, GradientStatistics]:
        num_layers = self._network.num_hidden_layers
        segment = math.isqrt(num_layers - 1) + 1
        boundaries = {0: self._embed()}
        hidden = boundaries[0]
        for index in range(num_layers):
            hidden = self._forward(index, hidden)
            if (index + 1) % segment == 0 and index + 1 < num_layers:
                boundaries[index + 1] = hidden
        gradients = self._head_gradients(hidden)
        found: dict[str, GradientStatistics] = {}
        while boundaries:
            start, hidden = boundaries.popitem()
            found |= self._segment_back(start, min(start + segment, num_layers), hidden, gradients)
        return {path: found[path] for path in self._network.linear_shapes()}

    def _segment_back(
        self, start: int, end: int, inputs: list[Tensor], gradients: list[Tensor]
    ) -> dict[str, GradientStatistics]:
        """Back through layers ``start .. end``; ``gradients`` become those by ``inputs``."""
        states = [inputs]
        for index in range(start, end - 1):
            states.append(self._forward(index, states[-1]))
        found: dict[str, GradientStatistics] = {}
        for index in reversed(range(start, end)):
            found |= self._backward(index, states.pop(), gradients)
            self._advance()
        return found

    def _embed(self) -> list[Tensor]:
        table = self._checkpoint.tensor("model.embed_tokens.weight", narrow=True).to(self._tokens.device)
        return [embed(row, table, torch.float32) for row in self._tokens]

    @torch.no_grad()
    def _forward(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        layer = DecoderLayer(self._network, index, self._weights)
        return [layer(states, self._batch, self._rotary) for states in hidden]

    def _backward(self, index: int, hidden: list[Tensor], gradients: list[Tensor]) -> dict[str, GradientStatistics]:
        """Take ``gradients`` by the outputs of a decoder layer to those by its inputs, in place."""
        layer = DecoderLayer(self._network, index, self._weights)
        totals = {
            path: GradientAccumulator(shape.out_features, shape.in_features, self._requires, self._tokens.device)
            for path, shape in self._network.layer_linear_shapes(index).items()
        }
        prefix = f"model.layers.{index}."
        for sequence, states in enumerate(hidden):
            inputs = states.detach().requires_grad_()
            with torch.enable_grad(), _watched(layer, prefix, totals, self._rotation_block_of):
                output = layer(inputs, self._batch, self._rotary)
                (gradients[sequence],) = torch.autograd.grad(output, inputs, gradients[sequence])
        return {path: total.finish(len(hidden), path) for path, total in totals.items()}

    @torch.no_grad()
    def _head_gradients(self, hidden: list[Tensor]) -> list[Tensor]:
        """Gradient of the loss by the outputs of the last decoder layer."""
        norm = RMSNorm(self._weights.tensor("model.norm.weight"), self._network.rms_norm_eps)
        head = self._checkpoint.tensor(self._network.head_name, narrow=True).to(self._tokens.device)
        gradients: list[Tensor] = []
        for states, row in zip(hidden, self._tokens, strict=True):
            inputs = states.detach().requires_grad_()
            with torch.enable_grad():
                normed = norm(inputs)
            # The last token predicts nothing that is known.
            by_normed = torch.zeros_like(normed)
            for start in range(0, len(row) - 1, _LOGIT_ROWS):
                rows = slice(start, min(start + _LOGIT_ROWS, len(row) - 1))
                by_normed[rows] = _nll_gradient(normed[rows], head, row[rows.start + 1 : rows.stop + 1])
            gradients += torch.autograd.grad(normed, inputs, by_normed)
        return gradients

    def _advance(self) -> None:
        self._num_done += 1
        if self._on_progress is not None:
            self._on_progress(self._num_done, self._network.num_hidden_layers)


def _nll_gradient(normed: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed nll of ``targets`` (n,) by ``normed`` (n, hidden_size): ``(softmax - onehot) @ head``."""
    by_logits = head_logits(normed, head).softmax(-1)
    by_logits[torch.arange(len(targets), device=targets.device), targets] -= 1
    gradient = torch.zeros_like(normed)
    for start in range(0, len(head), _HEAD_ROWS):
        gradient += by_logits[:, start : start + _HEAD_ROWS] @ head[start : start + _HEAD_ROWS].to(normed.dtype)
    return gradient


@contextmanager
def _watched(
    layer: nn.Module,
    prefix: str,
    totals: Mapping[str, GradientAccumulator],
    rotation_block_of: BlockOf,
) -> Iterator[None]:
    """While ``layer`` is run and differentiated, add what reaches its linear children to ``totals``."""

    def watcher(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, DenseLinear)  # noqa: S101 - DenseWeights makes no other kind
            x, block = inputs[0].detach(), rotation_block_of(path, module.in_features)

            def add(gradient: Tensor) -> None:
                totals[path].add(x, gradient, block)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    handles = [layer.get_submodule(path.removeprefix(prefix)).register_forward_hook(watcher(path)) for path in totals]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
