"""The page inside an artifact: what the build did to every linear layer, in a few inline drawings.

No scripts, no other files, tens of kilobytes: it goes wherever the artifact goes. The page of a comparison draws with
plotly, which alone would be larger than some artifacts (``figures``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.describe import vocabulary_rows
from ..artifact.format import Manifest
from ..artifact.record import LinearRecord
from .labels import in_network_order, recipe_label
from .page import environment, raw
from .svg import Heatmap, LineChart, heatmap, line_chart
from .table import MIB


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: ``path`` is its module path, ``depth`` its decoder layer, ``projection`` its own name."""

    path: str
    depth: int
    projection: str
    record: LinearRecord

    @classmethod
    def of(cls, path: str, record: LinearRecord) -> "Layer":
        """The layer at ``path`` (``model.layers.3.self_attn.q_proj``)."""
        return cls(path, int(path.split(".")[2]), path.rpartition(".")[2], record)

    def error(self, is_calibrated: bool) -> float:
        """Its output error, or its weight error without calibration."""
        output = self.record.relative_output_error
        return output if is_calibrated and output is not None else self.record.relative_weight_error

    @property
    def description(self) -> str:
        """One line for whoever points at it."""
        record = self.record
        output = "" if record.relative_output_error is None else f"output {record.relative_output_error:.4f}, "
        rank = f", rank {record.rank}" if record.rank else ""
        return (
            f"{self.depth} {self.projection}: {output}weight {record.relative_weight_error:.4f}, "
            f"{record.scheme.num_bits} bits{rank}"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """All layers of one projection: root mean square errors and bits per weight."""

    projection: str
    output_error: float | None
    weight_error: float
    largest: Layer
    effective_bits: float


def artifact_report(manifest: Manifest) -> bytes:
    """The page of one artifact, UTF-8; needs no optional package, and equal manifests give equal bytes."""
    layers = [Layer.of(path, record) for path, record in manifest.linears.items()]
    layers.sort(key=lambda layer: layer.depth)
    is_calibrated = all(layer.record.relative_output_error is not None for layer in layers)
    projections = in_network_order(layer.projection for layer in layers)
    page = (
        environment()
        .get_template("artifact.html")
        .render(
            header=_header(manifest),
            error_name="output error" if is_calibrated else "weight error",
            lines=_lines(layers, projections, is_calibrated),
            map=_map(layers, projections, is_calibrated),
            summaries=[_summary([it for it in layers if it.projection == name], is_calibrated) for name in projections],
            css=raw("base.css"),
        )
    )
    return page.encode("utf-8")


def _header(manifest: Manifest) -> dict[str, str]:
    build = manifest.build.to_dict()
    calibration = manifest.build.calibration
    source = "none" if calibration.source == "none" else (
        f"{calibration.source}, {calibration.num_sequences} × {calibration.sequence_length} tokens, "
        f"{calibration.inputs} inputs"
    )  # fmt: skip
    header = {
        "recipe": recipe_label(build),
        "effective bits per weight": f"{manifest.effective_bits:.3f}",
        **vocabulary_rows(manifest),
        "size": ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in manifest.component_bytes.items() if size),
        "dense at 16 bits": f"{manifest.dense_bytes / MIB:.1f} MiB",
        "calibration": source,
    }
    header |= {f"holdout {name.replace('_', ' ')}": f"{value:.6g}" for name, value in manifest.evaluation.items()}
    return header | {"checkpoint sha256": manifest.checkpoint_fingerprint, "qerve": manifest.qerve_version}


def _lines(layers: Sequence[Layer], projections: Sequence[str], is_calibrated: bool) -> LineChart:
    series = {
        name: [(layer.depth, layer.error(is_calibrated)) for layer in layers if layer.projection == name]
        for name in projections
    }
    return line_chart(series)


def _map(layers: Sequence[Layer], projections: Sequence[str], is_calibrated: bool) -> Heatmap:
    rows = {
        name: [
            (layer.depth, layer.error(is_calibrated), layer.description) for layer in layers if layer.projection == name
        ]
        for name in projections
    }
    return heatmap(rows)


def _summary(layers: Sequence[Layer], is_calibrated: bool) -> Summary:
    outputs = [layer.record.relative_output_error for layer in layers]
    weights = [layer.record.in_features * layer.record.out_features for layer in layers]
    bits = [layer.record.effective_bits * count for layer, count in zip(layers, weights, strict=True)]
    return Summary(
        projection=layers[0].projection,
        output_error=_rms([output for output in outputs if output is not None]) if is_calibrated else None,
        weight_error=_rms([layer.record.relative_weight_error for layer in layers]),
        largest=max(layers, key=lambda layer: layer.error(is_calibrated)),
        effective_bits=math.fsum(bits) / sum(weights),
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
