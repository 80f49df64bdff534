"""The plan of a build from its configuration alone: check, read the calibration text, rewrite, predict."""

from dataclasses import replace

import torch

from ..config import BuildConfig, CalibrationConfig, ReconstructConfig, TransformConfig
from ..llama.checkpoint import Checkpoint
from .calibrate import calibration_tokens
from .observer import BuildObserver, SilentObserver
from .plan import check_build
from .predict import PLANNING_TOKENS, Plan, plan_layers
from .prepare import prepare


def plan_build(
    checkpoint: Checkpoint,
    config: BuildConfig,
    *,
    device: torch.device | str = "cpu",
    observer: BuildObserver | None = None,
    use_gradients: bool = True,
) -> Plan:
    """What ``build_artifact`` would make of ``checkpoint``: size, memory and, with calibration, the loss.

    Takes no more calibration sequences than planning needs. With source ``none`` the plan is one of sizes: it is made
    for methods too which could not be built without calibration.

    Raises:
        SchemeError: the configuration cannot be carried out; found before any weight is read.
        CalibrationError: the calibration data cannot be used, or a statistic is not finite.
        CheckpointError: a tensor is missing or damaged.
    """
    observer, device = observer or SilentObserver(), torch.device(device)
    has_tokens = config.calibration.source != "none"
    if has_tokens or config.budget is not None:
        check_build(config, checkpoint.config)
    else:
        # Two tokens of whatever source: all checks but those of calibration.
        check_build(replace(config, calibration=CalibrationConfig(sequence_length=2)), checkpoint.config)
    calibration = config.calibration
    num_needed = max(calibration.num_gradient_sequences, -(-PLANNING_TOKENS // calibration.sequence_length))
    num_sequences = min(calibration.num_sequences, num_needed)
    only_needed = replace(calibration, num_sequences=num_sequences, num_holdout=0)
    tokens = calibration_tokens(checkpoint, only_needed, device, observer)
    # Only the rewrites are wanted; those that look at data leave shapes as they are.
    transform = (
        config.transform
        if has_tokens
        else TransformConfig(rotation=config.transform.rotation, rotation_block=config.transform.rotation_block)
    )
    rewriting = replace(config, transform=transform, budget=None, layers={}, reconstruct=ReconstructConfig("none"))
    prepared = prepare(checkpoint, rewriting, tokens, device, observer)
    plan = plan_layers(
        prepared.checkpoint,
        tokens,
        config,
        device,
        observer,
        use_gradients=use_gradients,
        flattening=prepared.known.flattening,
    )
    return replace(plan, dense_bytes=checkpoint.dense_bytes)
