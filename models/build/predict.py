"""What a build will come to, before it is started: bits and rank of each layer, size, memory, loss.

One pass forth and back takes gradients, one pass forth the statistics of every layer's inputs, both through the dense
network. Each layer's choices are priced and their losses predicted from one decomposition (``budget.losses``); a budget
is then spent where it removes most. Nothing is quantized for good and nothing is written.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import Choice, Option, allocate, network_choices
from ..calibration.data import CalibrationTokens
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..errors import SchemeError
from ..llama.checkpoint import Checkpoint
from .device_footprint import device_memory
from .footprint import build_memory_bytes, component_bytes, kv_cache_bytes, resident_bytes
from .observer import BuildObserver
from .planned import Plan, PlannedLayer
from .predictor import PLANNING_TOKENS, LossPredictor
from .recipe import training_method
from .training_footprint import training_memory_bytes

__all__ = ["PLANNING_TOKENS", "Plan", "PlannedLayer", "plan_layers"]


def plan_layers(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    config: BuildConfig,
    device: torch.device,
    observer: BuildObserver,
    *,
    use_gradients: bool = True,
    flattening: Mapping[str, Tensor] | None = None,
    store: StatisticsStore | None = None,
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
        store: of the same network, tokens and transforms; what planning collects is kept beside what it holds.

    Raises:
        SchemeError: a budget without calibration tokens.
        CalibrationError: a statistic or gradient is not finite.
        CheckpointError: a tensor is missing or damaged.
    """
    started = time.perf_counter()
    choices = network_choices(config, checkpoint.config)
    options: dict[str, list[Option]] | None = None
    if len(tokens.statistics):
        predictor = LossPredictor(checkpoint, tokens, config, device, observer, use_gradients, flattening or {}, store)
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
        training_memory_bytes=training_memory_bytes(checkpoint.config, config, device),
        gpu_memory_bytes={
            phase.value: size for phase, size in device_memory(checkpoint.config, config, torch.device("cuda")).items()
        },
        own=config.layers,
        has_ranks=training_method(config) is None,
    )
