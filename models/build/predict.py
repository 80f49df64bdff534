"""What a build will come to, before it is started: bits and rank of each layer, size, memory, loss.

One pass forth and back takes gradients, one pass forth the statistics of every layer's inputs, both through the dense
network. Each layer's choices are priced and their losses predicted from one decomposition (``budget.losses``); a budget
is then spent where it removes most. Nothing is quantized for good and nothing is written.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..budget import Choice, Option, allocate, network_choices
from ..budget.losses import LossModel, required_for_prediction
from ..calibration.backward import GradientStatistics, collect_gradients
from ..calibration.collect import INPUT_OWNERS, Measurement, Runs, collect_statistics
from ..calibration.data import CalibrationTokens
from ..config import BuildConfig
from ..errors import QerveError, SchemeError
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.model import DecoderLayer
from ..memory import return_freed_memory
from ..transform.inputs import InputTransform
from ..types import InputStatistics, Statistic
from .footprint import build_memory_bytes, component_bytes, kv_cache_bytes, resident_bytes
from .observer import BuildObserver
from .planned import Plan, PlannedLayer
from .recipe import rotation_block
from .stream import CalibrationStreams, HiddenStream

__all__ = ["Plan", "PlannedLayer", "plan_layers"]

PLANNING_TOKENS = 1 << 16
"""Tokens that statistics are taken from: enough for sums over whole layers, where a build's corrections need more."""


def plan_layers(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    config: BuildConfig,
    device: torch.device,
    observer: BuildObserver,
    *,
    use_gradients: bool = True,
    flattening: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Choose bits and rank of every linear layer within ``config.budget``, or price the one scheme there is without.

    Args:
        checkpoint: the network that will be quantized, offline transforms folded in.
        tokens: the calibration set; empty: size and memory only, no loss.
        config: what would be built, already checked.
        device: where to compute, and to serve.
        observer: is told of the progress.
        use_gradients: weigh the outputs of a layer by what the loss makes of them; False: relative output errors.
        flattening: (in_features,) what an input was divided by when ``checkpoint`` was rewritten, by its owner's path.

    Raises:
        SchemeError: a budget without calibration tokens.
        CalibrationError: a statistic or gradient is not finite.
        CheckpointError: a tensor is missing or damaged.
    """
    started = time.perf_counter()
    choices = network_choices(config, checkpoint.config)
    options: dict[str, list[Option]] | None = None
    if len(tokens.statistics):
        predictor = _Predictor(checkpoint, tokens, config, device, observer, use_gradients, flattening or {})
        options = predictor.options(choices)
    chosen = _spend(choices, options, config, checkpoint)
    losses = None if options is None else {path: option.loss for path, (_, option) in chosen.items()}
    plan = _summary(checkpoint, config, {path: choice for path, (choice, _) in chosen.items()}, losses, device)
    is_nll = use_gradients and losses is not None
    total = None if losses is None else math.fsum(losses.values())
    return replace(
        plan,
        nll_increase=total if is_nll else None,
        output_error=None if is_nll or total is None else total / len(plan.linears),
        seconds=round(time.perf_counter() - started, 2),
    )


def _spend(
    choices: Mapping[str, list[Choice]],
    options: Mapping[str, list[Option]] | None,
    config: BuildConfig,
    checkpoint: Checkpoint,
) -> dict[str, tuple[Choice, Option]]:
    """One choice per layer: the only one, or under a budget the best."""
    if options is None:
        if config.budget is not None:
            raise SchemeError("target bits are spent where calibration shows a loss: give --calibration self or a file")
        unknown = {
            path: Option(it[0].scheme.num_bits, it[0].rank, it[0].stored_bits, 0.0) for path, it in choices.items()
        }
        return {path: (choices[path][0], option) for path, option in unknown.items()}
    if config.budget is None:
        return {path: (offered[0], options[path][0]) for path, offered in choices.items()}
    num_weights = sum(it.out_features * it.in_features for it in checkpoint.config.linear_shapes().values())
    chosen = allocate(options, config.budget.target_bits * num_weights)
    return {path: (choices[path][options[path].index(option)], option) for path, option in chosen.items()}


def _summary(
    checkpoint: Checkpoint,
    config: BuildConfig,
    chosen: Mapping[str, Choice],
    losses: Mapping[str, float] | None,
    device: torch.device,
) -> Plan:
    """The plan without its total loss."""
    linears = {}
    for path, shape in checkpoint.config.linear_shapes().items():
        choice, num_weights = chosen[path], shape.out_features * shape.in_features
        linears[path] = PlannedLayer(
            num_bits=choice.scheme.num_bits,
            group_size=choice.scheme.group_size,
            rank=choice.rank,
            num_weights=num_weights,
            effective_bits=choice.stored_bits / num_weights,
            loss=None if losses is None else losses[path],
        )
    components = component_bytes(checkpoint, config, chosen)
    num_weights = sum(layer.num_weights for layer in linears.values())
    return Plan(
        linears=linears,
        effective_bits=math.fsum(choice.stored_bits for choice in chosen.values()) / num_weights,
        component_bytes=components,
        artifact_bytes=sum(components.values()) + sum(map(len, checkpoint.tokenizer_files.values())),
        dense_bytes=checkpoint.dense_bytes,
        resident_bytes=resident_bytes(checkpoint, config, chosen, device),
        kv_cache_bytes=kv_cache_bytes(checkpoint.config, device),
        build_memory_bytes=build_memory_bytes(checkpoint.config, config),
        own=config.layers,
    )


@dataclass(frozen=True, slots=True)
class _Predictor:
    """Walks the dense network and predicts the losses of every layer's choices."""

    checkpoint: Checkpoint
    tokens: CalibrationTokens
    config: BuildConfig
    device: torch.device
    observer: BuildObserver
    use_gradients: bool
    flattening: Mapping[str, Tensor] = field(default_factory=dict)

    def options(self, choices: Mapping[str, list[Choice]]) -> dict[str, list[Option]]:
        gradients = self._gradients()
        stream = self._stream()
        dense = DenseWeights(self.checkpoint, torch.float32, self.device)
        num_layers = self.checkpoint.config.num_hidden_layers
        self.observer.phase("predicting losses", num_layers)
        options: dict[str, list[Option]] = {}
        for index in range(num_layers):
            layer = DecoderLayer(self.checkpoint.config, index, dense)
            options |= self._layer_options(layer, f"model.layers.{index}", stream.runs, gradients, choices)
            stream.advance(layer)
            return_freed_memory()
            self.observer.progress(index + 1)
        return options

    def _layer_options(
        self,
        layer: DecoderLayer,
        prefix: str,
        runs: Runs,
        gradients: Mapping[str, GradientStatistics],
        choices: Mapping[str, list[Choice]],
    ) -> dict[str, list[Option]]:
        transforms = {}
        for owner in INPUT_OWNERS:
            in_features = layer.get_parameter(f"{owner}.weight").shape[1]
            block = rotation_block(self.config, f"{prefix}.{owner}", in_features)
            transforms[owner] = InputTransform(rotation_block=block)
        measurement = Measurement(required_for_prediction(self.config), transforms)
        statistics = collect_statistics(layer, runs, measurement, prefix)
        options = {}
        for owner, children in INPUT_OWNERS.items():
            model = LossModel(self.config, statistics[owner])
            for child in children:
                path = f"{prefix}.{child}"
                known = self._known(statistics[child], gradients.get(path), f"{prefix}.{owner}")
                weight = transforms[owner].weight(layer.get_parameter(f"{child}.weight").data)
                try:
                    options[path] = model.options(weight, known, choices[path], self._unit())
                except QerveError as error:
                    raise type(error)(f"{path}: {error}") from error
        return options

    def _known(self, statistics: InputStatistics, gradients: GradientStatistics | None, owner: str) -> InputStatistics:
        statistics = replace(statistics, flattening=self.flattening.get(owner))
        if gradients is None:
            return statistics
        return replace(
            statistics,
            fisher_rows=gradients.fisher_rows,
            fisher_columns=gradients.fisher_columns,
            output_gradient=gradients.output_gradient,
        )

    def _unit(self) -> float | None:
        """From ``tr(D E R E^T)`` to nats per predicted token; None: relative to the layer's output."""
        length = self.tokens.statistics.shape[1]
        return 0.5 * length / (length - 1) if self.use_gradients else None

    def _gradients(self) -> dict[str, GradientStatistics]:
        requires = {it for it in required_for_prediction(self.config) if it.needs_gradients}
        if self.use_gradients:
            requires.add(Statistic.OUTPUT_GRADIENT)
        if not requires:
            return {}
        self.observer.phase("taking gradients", self.checkpoint.config.num_hidden_layers)
        return collect_gradients(
            self.checkpoint,
            self.tokens.statistics[: self.config.calibration.num_gradient_sequences],
            self.device,
            frozenset(requires),
            lambda path, in_features: rotation_block(self.config, path, in_features),
            on_progress=lambda done, _total: self.observer.progress(done),
        )

    def _stream(self) -> HiddenStream:
        sequences = self.tokens.statistics
        num_sequences = max(1, -(-PLANNING_TOKENS // sequences.shape[1]))
        only = CalibrationTokens(sequences[:num_sequences], sequences[:0])
        return CalibrationStreams.start(self.checkpoint, only, self.config.calibration, self.device).statistics
