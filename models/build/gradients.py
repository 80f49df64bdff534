"""Gradients of the whole network, taken once and kept beside the statistics of inputs."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..calibration.backward import GradientStatistics, collect_gradients
from ..calibration.collect import INPUT_OWNERS
from ..calibration.data import CalibrationTokens
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..llama.checkpoint import Checkpoint
from ..types import InputStatistics, Statistic
from .observer import BuildObserver
from .recipe import rotation_block


def network_gradients(
    checkpoint: Checkpoint,
    config: BuildConfig,
    tokens: CalibrationTokens,
    device: torch.device,
    observer: BuildObserver,
    *,
    requires: frozenset[Statistic],
    store: StatisticsStore | None = None,
) -> dict[str, GradientStatistics]:
    """Gradient statistics of every linear layer by module path; empty when ``requires`` names none.

    Args:
        checkpoint: the network, offline transforms folded in.
        config: which sequences, and the rotations.
        tokens: the calibration set.
        device: where to compute.
        observer: is told of the progress.
        requires: what to take; statistics of inputs in it are ignored.
        store: of the same network and tokens; gradients are kept beside what it holds.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    wanted = frozenset(statistic for statistic in requires if statistic.needs_gradients)
    if not wanted:
        return {}
    sequences = tokens.statistics[: config.calibration.num_gradient_sequences]
    num_layers = checkpoint.config.num_hidden_layers
    kept = None if store is None else _beside(store, len(sequences))
    if kept is not None and (known := _load(kept, num_layers, wanted, device)) is not None:
        return known
    observer.phase("taking gradients", num_layers)
    gradients = collect_gradients(
        checkpoint,
        sequences,
        device,
        wanted,
        lambda path, in_features: rotation_block(config, path, in_features),
        on_progress=lambda done, _total: observer.progress(done),
    )
    if kept is not None:
        _save(kept, num_layers, gradients, sequences.numel())
    return gradients


def with_gradients(statistics: InputStatistics, gradients: GradientStatistics | None) -> InputStatistics:
    """``statistics`` of a layer's input together with the gradients of that layer."""
    if gradients is None:
        return statistics
    return replace(
        statistics,
        fisher_rows=gradients.fisher_rows,
        fisher_columns=gradients.fisher_columns,
        output_gradient=gradients.output_gradient,
        input_energy=gradients.input_energy,
    )


def _beside(store: StatisticsStore, num_sequences: int) -> StatisticsStore:
    """Gradients are taken of fewer sequences than statistics of inputs, hence a store of their own."""
    return StatisticsStore(store.directory / "gradients", f"{store.fingerprint}, {num_sequences} sequences")


def _load(
    store: StatisticsStore, num_layers: int, wanted: frozenset[Statistic], device: torch.device
) -> dict[str, GradientStatistics] | None:
    gradients: dict[str, GradientStatistics] = {}
    for index in range(num_layers):
        layer = store.load(index, wanted, device)
        if layer is None:
            return None
        for child, item in layer.items():
            gradients[f"model.layers.{index}.{child}"] = GradientStatistics(
                item.fisher_rows, item.fisher_columns, item.output_gradient, item.input_energy
            )
    return gradients


def _save(
    store: StatisticsStore, num_layers: int, gradients: Mapping[str, GradientStatistics], num_tokens: int
) -> None:
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        children = (child for group in INPUT_OWNERS.values() for child in group)
        store.save(
            index,
            {child: with_gradients(InputStatistics(num_tokens), gradients[prefix + child]) for child in children},
        )
