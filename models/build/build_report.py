"""What a build did and what it cost."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..artifact.format import Manifest
from ..llama.checkpoint import Checkpoint
from ..memory import PeakMemory, directory_bytes
from .footprint import memory_bound_bytes
from .holdout import HoldoutEvaluation
from .stream import CalibrationStreams


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did and what it cost.

    dense_vocabulary_perplexity: of the quantized layers between dense embedding and head; None where these are not
        quantized
    peak_memory_bytes:      most that the layer-by-layer build held above what the process held before
    memory_bound_bytes:     dense embedding + one dense decoder layer (float32) + activations of the calibration set
    preparation_peak_bytes: the same as the first for what comes before the layers: encoding a text or having the
        network write one, looking over the network for flattening, gradients and budgets
    Mapped files are not counted: the system takes their pages back when it needs them.
    """

    artifact: str
    seconds: float
    peak_memory_bytes: int
    memory_bound_bytes: int
    preparation_peak_bytes: int
    dense_perplexity: float | None
    quantized_perplexity: float | None
    dense_vocabulary_perplexity: float | None
    effective_bits: float
    artifact_bytes: int
    dense_bytes: int
    num_resumed_layers: int

    def to_dict(self) -> dict[str, object]:
        """Plain dict for JSON."""
        return asdict(self)


def report(
    checkpoint: Checkpoint,
    out: Path,
    manifest: Manifest,
    streams: CalibrationStreams,
    evaluation: HoldoutEvaluation,
    *,
    seconds: float,
    preparing: PeakMemory,
    building: PeakMemory,
    num_resumed: int,
) -> BuildReport:
    """The report of a build that has finished.

    Args:
        checkpoint: the dense network.
        out: the artifact.
        manifest: of the artifact.
        streams: behind the last decoder layer.
        evaluation: of the holdout.
        seconds: that the build took.
        preparing: memory until the first decoder layer.
        building: memory from then on.
        num_resumed: decoder layers that were there already.
    """
    return BuildReport(
        artifact=str(out),
        seconds=round(seconds, 2),
        peak_memory_bytes=building.growth_bytes,
        preparation_peak_bytes=preparing.growth_bytes,
        memory_bound_bytes=memory_bound_bytes(checkpoint.config, streams.largest_batch, streams.nbytes),
        dense_perplexity=evaluation.values.get("dense_perplexity"),
        quantized_perplexity=evaluation.values.get("quantized_perplexity"),
        dense_vocabulary_perplexity=evaluation.values.get("dense_vocabulary_perplexity"),
        effective_bits=manifest.effective_bits,
        artifact_bytes=directory_bytes(out),
        dense_bytes=checkpoint.dense_bytes,
        num_resumed_layers=num_resumed,
    )
