"""Statistics of one decoder layer: run it over the calibration set and watch the inputs of its linear layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..types import InputStatistics, Statistic
from .statistics import StatisticsAccumulator

INPUT_OWNERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The linear layers whose input is watched, and those that share it: q/k/v and gate/up read the same activations."""


@torch.inference_mode()
def collect_statistics(
    layer: nn.Module,
    run: Callable[[], None],
    requires: frozenset[Statistic],
    where: str,
) -> dict[str, InputStatistics]:
    """Run ``layer`` over the calibration set and accumulate its linear layers' input statistics.

    Args:
        layer: a decoder layer whose linear children are named as in ``INPUT_OWNERS``.
        run: takes every batch of the calibration set through ``layer``.
        requires: what to accumulate.
        where: the layer's module path, for messages.

    Returns:
        Statistics by child path (``self_attn.k_proj``), one object per shared input.

    Raises:
        CalibrationError: a statistic is not finite.
    """
    accumulators: dict[str, StatisticsAccumulator] = {}
    handles = []
    for owner in INPUT_OWNERS:

        def watch(_module: nn.Module, inputs: tuple[Tensor, ...], owner: str = owner) -> None:
            if owner not in accumulators:
                accumulators[owner] = StatisticsAccumulator(inputs[0].shape[-1], requires, inputs[0].device)
            accumulators[owner].update(inputs[0])

        handles.append(layer.get_submodule(owner).register_forward_pre_hook(watch))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    statistics: dict[str, InputStatistics] = {}
    for owner, members in INPUT_OWNERS.items():
        finished = accumulators[owner].finish(f"{where}.{owner}")
        statistics.update(dict.fromkeys(members, finished))
    return statistics
