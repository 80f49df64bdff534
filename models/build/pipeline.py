"""The build pipeline. Per decoder layer: statistics on its inputs, quantize, reconstruct, write, run it quantized.

Held at any moment: the embedding (at both ends), one dense decoder layer with its quantized form and its statistics,
and the hidden states of the calibration set. A finished layer is final on disk, so a build that was interrupted goes
on where it stopped.
"""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..artifact.format import Manifest
from ..artifact.partial import check_target
from ..artifact.writer import ArtifactWriter
from ..calibration.data import CalibrationTokens
from ..calibration.store import StatisticsStore
from ..config import BuildConfig
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..memory import PeakMemory, return_freed_memory
from ..report.layers import artifact_report
from .build_report import BuildReport, report
from .calibrate import calibration_tokens
from .ceiling import memory_need
from .end_to_end import train_end_to_end, trains_end_to_end
from .holdout import HoldoutEvaluation, evaluate_holdout
from .layer import LayerBuilder
from .observer import BuildObserver, SilentObserver
from .plan import check_build
from .prepare import Prepared, prepare
from .recipe import has_target_stream, sequences_together
from .spill import HiddenFiles
from .stream import CalibrationStreams
from .training import num_blocks_together
from .vocabulary import needs_head_statistics, quantized_embedding, write_rest


def build_artifact(
    checkpoint: Checkpoint,
    out: Path,
    config: BuildConfig,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    observer: BuildObserver | None = None,
    statistics: StatisticsStore | None = None,
    spills: bool = False,
    max_memory: int | None = None,
) -> BuildReport:
    """Quantize ``checkpoint`` into the artifact directory ``out``.

    Args:
        checkpoint: the dense network.
        out: directory to write.
        config: what to build.
        device: where to compute.
        overwrite: replace an artifact of that name.
        observer: is told of the progress.
        statistics: where to look for, and keep, what a calibration on dense inputs accumulates.
        spills: hidden states of the calibration set are on disk, and an interrupted build goes on with them.
        max_memory: bytes to hold in the host's memory, mapped files aside: spills if it must; None: no limit.

    Raises:
        SchemeError: the configuration cannot be carried out, or not in that memory; found before a weight is read.
        CalibrationError: the calibration data cannot be used, or a statistic is not finite.
        CheckpointError: a tensor is missing or damaged.
        ArtifactError: ``out`` exists and ``overwrite`` is false.
    """
    started, observer, device = time.perf_counter(), observer or SilentObserver(), torch.device(device)
    check_build(config, checkpoint.config)
    if max_memory is not None:
        spills |= memory_need(checkpoint.config, config, device).must_spill(max_memory)
    check_target(out, overwrite)
    with PeakMemory() as preparing:
        tokens = calibration_tokens(checkpoint, config.calibration, device, observer)
        identity = build_fingerprint(checkpoint, config, tokens)
        prepared = prepare(checkpoint, config, tokens, device, observer, store=statistics)
    return_freed_memory()
    with PeakMemory() as building:
        writer = ArtifactWriter(out, prepared.checkpoint.config.with_vocabulary(config.vocabulary), identity, overwrite)
        streams, num_resumed = _build_layers(prepared, tokens, writer, device, observer, spills=spills)
        if trains_end_to_end(prepared.config):
            streams = train_end_to_end(
                prepared.checkpoint, prepared.config, writer, tokens, streams=streams, device=device, observer=observer
            )
        manifest, evaluation = _finish(writer, prepared.checkpoint, config, tokens, streams)
    return report(
        checkpoint,
        out,
        manifest,
        streams,
        evaluation,
        seconds=time.perf_counter() - started,
        preparing=preparing,
        building=building,
        num_resumed=num_resumed,
    )


def _build_layers(
    prepared: Prepared,
    tokens: CalibrationTokens,
    writer: ArtifactWriter,
    device: torch.device,
    observer: BuildObserver,
    *,
    spills: bool,
) -> tuple[CalibrationStreams, int]:
    """Build every decoder layer and what belongs to none.

    Returns:
        The streams at the network's end, and how many layers were there already.
    """
    checkpoint, config = prepared.checkpoint, prepared.config
    if prepared.has_all_statistics and not needs_head_statistics(config):
        tokens = replace(tokens, statistics=tokens.statistics[:0])
    num_resumed, num_layers = writer.finished_layers(), checkpoint.config.num_hidden_layers
    files = HiddenFiles(writer.hidden_directory) if spills else None
    size = num_blocks_together(config)
    streams, first = _start(checkpoint, config, tokens, device, files, num_finished=num_resumed, step=size)
    builder = LayerBuilder(config, DenseWeights(checkpoint, torch.float32, device), writer, prepared.known)
    observer.phase("quantizing layers", num_layers)
    for start in range(first, num_layers, size):
        indices = range(start, min(start + size, num_layers))
        trained = builder.step(indices, streams, is_finished=indices[-1] < num_resumed)
        if files is not None:
            files.keep_only(indices[-1] + 1)
        return_freed_memory()
        note = "" if trained is None else f"loss {trained.loss_before:.4f} to {trained.loss_after:.4f}"
        observer.progress(indices[-1] + 1, note)
    # Before scales are trained end to end, so that a build which is interrupted then goes on to the same head.
    write_rest(writer, checkpoint, config, streams.statistics, device)
    return streams, num_resumed


def _start(
    checkpoint: Checkpoint,
    config: BuildConfig,
    tokens: CalibrationTokens,
    device: torch.device,
    files: HiddenFiles | None,
    *,
    num_finished: int,
    step: int,
) -> tuple[CalibrationStreams, int]:
    """The streams before the first decoder layer, or as far on as ``files`` have them, and that layer's index."""
    embedding, has_target = quantized_embedding(checkpoint, config, device), has_target_stream(config)
    position = 0
    if files is not None:
        num_values = CalibrationStreams.num_values(
            tokens,
            checkpoint.config.hidden_size,
            has_target=has_target,
            has_quantized_embedding=embedding is not None,
        )
        position = files.last_position(num_values, num_finished, step)
    streams = CalibrationStreams.start(
        checkpoint,
        tokens,
        config.calibration,
        device,
        has_target=has_target,
        num_together=sequences_together(config),
        quantized=embedding,
        files=files,
        position=position,
    )
    return streams, position


def build_fingerprint(checkpoint: Checkpoint, config: BuildConfig, tokens: CalibrationTokens) -> str:
    """sha256 that two builds share when a layer finished by one can be taken over by the other."""
    described = json.dumps([checkpoint.fingerprint, tokens.fingerprint, _recorded(config).to_dict()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _finish(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    config: BuildConfig,
    tokens: CalibrationTokens,
    streams: CalibrationStreams,
) -> tuple[Manifest, HoldoutEvaluation]:
    """Score the holdout and give the artifact its name, with everything that the shards do not hold."""
    evaluation = evaluate_holdout(checkpoint, streams, writer.read_vocabulary())
    manifest = writer.finish(
        build=_recorded(config),
        hf_config=checkpoint.hf_config,
        generation_config=checkpoint.generation_config,
        tokenizer_files=checkpoint.tokenizer_files,
        checkpoint_fingerprint=checkpoint.fingerprint,
        calibration_fingerprint=tokens.fingerprint if len(tokens.statistics) else None,
        evaluation=evaluation.values,
        probe=evaluation.probe,
        report=artifact_report,
    )
    return manifest, evaluation


def _recorded(config: BuildConfig) -> BuildConfig:
    """``config`` as the artifact records it: a calibration file by its name, wherever it lies."""
    source = config.calibration.source
    if source in {"self", "none"} or source.startswith("hf:"):
        return config
    return replace(config, calibration=replace(config.calibration, source=Path(source).name))
