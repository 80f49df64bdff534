"""Predicted losses of every choice of every linear layer, from a pass through the dense network.

Errors are fitted (by gptq, by a correction) to one part of the calibration set and judged by another: what was fitted
carries over to other text only in part, and the fewer tokens there are for the channels the less.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import Choice, Option
from ..budget.losses import LossModel, input_statistics
from ..calibration.backward import GradientStatistics
from ..calibration.collect import INPUT_OWNERS, Measurement, Runs, collect_statistics
from ..calibration.data import CalibrationTokens
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..errors import QerveError
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer
from ..memory import return_freed_memory
from ..reconstruct import get_reconstructor
from ..transform.inputs import InputTransform
from ..transform.shrink import shrunk
from ..types import InputStatistics, Statistic
from .gradients import network_gradients, with_gradients
from .observer import BuildObserver
from .recipe import input_transforms
from .stream import CalibrationStreams, HiddenStream

PLANNING_TOKENS = 1 << 16
"""Tokens that statistics are taken from: enough for sums over whole layers, where a build's corrections need more."""


@dataclass(slots=True)
class Part:
    """Some batches of the calibration set: their statistics, from the store or by running a layer over them."""

    name: str
    requires: frozenset[Statistic]
    store: StatisticsStore | None
    runs: Runs = ()

    def is_kept(self, num_layers: int) -> bool:
        """The store has everything."""
        return self.store is not None and all(self.store.has(index, self.requires) for index in range(num_layers))

    def statistics(
        self, index: int, layer: DecoderLayer, transforms: Mapping[str, InputTransform]
    ) -> dict[str, InputStatistics]:
        """By child path, of decoder layer ``index``."""
        if self.store is not None and not self.runs:
            kept = self.store.load(index, self.requires, next(layer.parameters()).device)
            if kept is not None:
                return kept
        statistics = collect_statistics(
            layer, self.runs, Measurement(self.requires, transforms), f"model.layers.{index}"
        )
        if self.store is not None:
            self.store.save(index, statistics)
        return statistics


def split_runs(runs: Runs) -> tuple[Runs, Runs]:
    """Batches to fit to, and batches to judge by: every fourth, or the last; a single batch serves as both."""
    if len(runs) < 2:
        return runs, runs
    judging = set(range(3, len(runs), 4)) or {len(runs) - 1}
    return (
        [run for index, run in enumerate(runs) if index not in judging],
        [run for index, run in enumerate(runs) if index in judging],
    )


@dataclass(frozen=True, slots=True)
class LossPredictor:
    """Walks the dense network and predicts the losses of every layer's choices; fields as ``plan_layers`` has them."""

    checkpoint: Checkpoint
    tokens: CalibrationTokens
    config: BuildConfig
    device: torch.device
    observer: BuildObserver
    use_gradients: bool
    flattening: Mapping[str, Tensor]
    store: StatisticsStore | None

    def options(self, choices: Mapping[str, list[Choice]]) -> dict[str, list[Option]]:
        """The ``choices`` of every linear layer with their losses, by module path.

        Raises:
            CalibrationError: a statistic or gradient is not finite.
            CheckpointError: a tensor is missing or damaged.
        """
        gradients = self._gradients()
        num_layers = self.checkpoint.config.num_hidden_layers
        stream, fitting, judging = self._parts()
        dense = DenseWeights(self.checkpoint, torch.float32, self.device)
        self.observer.phase("predicting losses", num_layers)
        options: dict[str, list[Option]] = {}
        for index in range(num_layers):
            layer, prefix = DecoderLayer(self.checkpoint.config, index, dense), f"model.layers.{index}"
            transforms = input_transforms(self.config, index, self.checkpoint.config)
            statistics = (
                fitting.statistics(index, layer, transforms),
                judging.statistics(index, layer, transforms),
            )
            options |= self._layer_options(layer, prefix, transforms, statistics, gradients=gradients, choices=choices)
            stream.advance(layer)
            return_freed_memory()
            self.observer.progress(index + 1)
        return options

    def _layer_options(
        self,
        layer: DecoderLayer,
        prefix: str,
        transforms: Mapping[str, InputTransform],
        statistics: tuple[Mapping[str, InputStatistics], Mapping[str, InputStatistics]],
        *,
        gradients: Mapping[str, GradientStatistics],
        choices: Mapping[str, list[Choice]],
    ) -> dict[str, list[Option]]:
        options = {}
        fitted, judged = statistics
        for owner, children in INPUT_OWNERS.items():
            shared = shrunk(fitted[owner], self.config.calibration.shrinkage, transforms[owner].rotation_block)
            shared = replace(shared, flattening=self.flattening.get(f"{prefix}.{owner}"))
            model = LossModel(self.config, shared, judged[owner])
            for child in children:
                path = f"{prefix}.{child}"
                known = with_gradients(shared, gradients.get(path))
                energy = gradients[path].input_energy if path in gradients else None
                weight = transforms[owner].weight(layer.get_parameter(f"{child}.weight").data)
                try:
                    options[path] = model.options(weight, known, choices[path], self._unit(), energy)
                except QerveError as error:
                    raise type(error)(f"{path}: {error}") from error
        return options

    def _unit(self) -> float | None:
        """From ``tr(D E R E^T)`` to nats per predicted token; None: relative to the layer's output."""
        length = self.tokens.statistics.shape[1]
        return 0.5 * length / (length - 1) if self.use_gradients else None

    def _gradients(self) -> dict[str, GradientStatistics]:
        requires = get_reconstructor(self.config.reconstruct).requires
        if self.use_gradients:
            requires |= {Statistic.OUTPUT_GRADIENT}
        return network_gradients(
            self.checkpoint, self.config, self.tokens, self.device, self.observer, requires=requires, store=self.store
        )

    def _parts(self) -> tuple[HiddenStream, Part, Part]:
        """The calibration set before the first layer, the batches that errors are fitted to, and those that judge."""
        sequences = self.tokens.statistics
        sequences = sequences[: max(1, -(-PLANNING_TOKENS // sequences.shape[1]))]
        requires = input_statistics(self.config)
        only_input = frozenset({Statistic.AUTOCORRELATION})
        fitting = Part("fitting", requires, self._kept("fitting", len(sequences)))
        judging = Part("judging", only_input, self._kept("judging", len(sequences)))
        num_layers = self.checkpoint.config.num_hidden_layers
        if fitting.is_kept(num_layers) and judging.is_kept(num_layers):
            sequences = sequences[:0]
        tokens = CalibrationTokens(sequences, sequences[:0])
        stream = CalibrationStreams.start(self.checkpoint, tokens, self.config.calibration, self.device).statistics
        fitting.runs, judging.runs = split_runs(stream.runs)
        return stream, fitting, judging

    def _kept(self, name: str, num_sequences: int) -> StatisticsStore | None:
        """Planning looks at other sequences than a build does, hence stores of its own."""
        if self.store is None:
            return None
        batch_size = self.config.calibration.batch_size
        fingerprint = f"{self.store.fingerprint}, {num_sequences} sequences by {batch_size}"
        return StatisticsStore(self.store.directory / "planning" / name, fingerprint)
