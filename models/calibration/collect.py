"""Statistics of one decoder layer: run it over the calibration set and watch the inputs of its linear layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..quant.activation import quantize_activations
from ..scheme import ActivationScheme
from ..transform.inputs import InputTransform
from ..types import QUANTIZED_STATISTICS, InputStatistics, Statistic
from .statistics import LayerInputs, StatisticsAccumulator

INPUT_OWNERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The linear layers whose input is watched, in the order in which they run, and those that share it."""

Runs = Sequence[Callable[[nn.Module], object]]
"""One per batch of the calibration set: takes it through a decoder layer."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What to measure, and what the inputs go through first.

    requires:    what to accumulate; gradients are not taken here and ignored
    transforms:  of the inputs, by owner; absent: none
    activations: how they are quantized; None: not at all
    """

    requires: frozenset[Statistic]
    transforms: Mapping[str, InputTransform] = field(default_factory=dict)
    activations: ActivationScheme | None = None

    def inputs(self, owner: str, x: Tensor, target: Tensor | None) -> LayerInputs:
        """A batch ``x`` of owner's inputs as they are measured; ``target`` None: the same as ``x``."""
        transform = self.transforms.get(owner, InputTransform())
        x = transform.apply(x)
        scheme = None if self.requires.isdisjoint(QUANTIZED_STATISTICS) else self.activations
        quantized = x if scheme is None else quantize_activations(x, scheme)
        return LayerInputs(x, quantized, x if target is None else transform.apply(target))


@dataclass(frozen=True, slots=True)
class Target:
    """The dense layer, and the calibration set on its way through the dense network."""

    layer: nn.Module
    runs: Runs


@torch.inference_mode()
def collect_statistics(
    layer: nn.Module,
    runs: Runs,
    measurement: Measurement,
    where: str,
    *,
    owners: Sequence[str] = tuple(INPUT_OWNERS),
    target: Target | None = None,
) -> dict[str, InputStatistics]:
    """Run ``layer`` over the calibration set and accumulate its linear layers' input statistics.

    Args:
        layer: a decoder layer whose linear children are named as in ``INPUT_OWNERS``.
        runs: the calibration set, batch by batch.
        measurement: what to accumulate of what.
        where: the layer's module path, for messages.
        owners: which inputs to watch.
        target: what ``cross_correlation`` correlates with; None: the inputs before their quantization.

    Returns:
        Statistics by child path (``self_attn.k_proj``), one object per shared input.

    Raises:
        CalibrationError: a statistic is not finite.
    """
    requires = frozenset(statistic for statistic in measurement.requires if not statistic.needs_gradients)
    if Statistic.CROSS_CORRELATION not in requires:
        target = None  # one pass less
    accumulators: dict[str, StatisticsAccumulator] = {}
    for index, run in enumerate(runs):
        targets = {} if target is None else _inputs(target.layer, target.runs[index], owners)

        def see(owner: str, x: Tensor, targets: dict[str, Tensor] = targets) -> None:
            if owner not in accumulators:
                accumulators[owner] = StatisticsAccumulator(x.shape[-1], requires, x.device)
            accumulators[owner].update(measurement.inputs(owner, x, targets.pop(owner, None)))

        with _watched(layer, owners, see):
            run(layer)
    statistics: dict[str, InputStatistics] = {}
    for owner in owners:
        accumulator = accumulators.get(owner) or StatisticsAccumulator(0, requires)
        statistics.update(dict.fromkeys(INPUT_OWNERS[owner], accumulator.finish(f"{where}.{owner}")))
    return statistics


def _inputs(layer: nn.Module, run: Callable[[nn.Module], object], owners: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of one batch by owner."""
    seen: dict[str, Tensor] = {}
    with _watched(layer, owners, seen.__setitem__):
        run(layer)
    return seen


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the layer is not needed
    """Everything watched has been seen."""


@contextmanager
def _watched(layer: nn.Module, owners: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(owner, inputs)`` whenever an owner is run, and leave the layer after the last of them."""
    last = max(owners, key=list(INPUT_OWNERS).index)

    def watcher(owner: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(owner, inputs[0])
            if owner == last:
                raise _Enough

        return watch

    handles = [layer.get_submodule(owner).register_forward_pre_hook(watcher(owner)) for owner in owners]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
