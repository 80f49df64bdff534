"""What ``qerve inspect`` shows: the manifest's figures, and the kernel backend that each layer would get here."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..device import default_dtype
from ..kernels import get_backends
from ..kernels.base import LinearSpec, Selection, select_backend
from ..kernels.native.backend import NativeBackend
from ..llama.attention_choice import choose_attention
from ..llama.fuse import obstacle_of
from ..scheme import EMBEDDING, HEAD
from .describe import describe_build, describe_scheme, describe_vocabulary, vocabulary_rows
from .execution import Execution, RunOptions, describe_backends
from .format import Manifest
from .reader import ArtifactReader
from .record import LinearRecord

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Inspection:
    """An artifact's manifest, and per linear layer the backend that would run it on this machine.

    selections: of the decoder layers' linear layers and, where it is quantized, of the head
    execution:  how the network would run, as far as can be told without loading it
    """

    path: Path
    manifest: Manifest
    selections: dict[str, Selection]
    dtype: torch.dtype
    execution: Execution

    def to_dict(self) -> dict[str, object]:
        """The manifest without its list of tensors and files, embedding, head and backends, as plain values."""
        values = self.manifest.model_dump(mode="json", exclude={"tensors", "files"})
        values |= {name: asdict(part) for name, part in describe_vocabulary(self.manifest).items()}
        return values | {
            "path": str(self.path),
            "backends": self.num_layers_by_backend,
            "passed_over": self.reasons,
            "execution": self.execution.rows(),
        }

    @property
    def num_layers_by_backend(self) -> dict[str, int]:
        """Number of linear layers that each backend would run."""
        return dict(Counter(selection.backend.name for selection in self.selections.values()))

    @property
    def reasons(self) -> dict[str, int]:
        """Why preferred backends would not run a layer: reason -> number of layers."""
        passed_over = (item for selection in self.selections.values() for item in selection.passed_over)
        return dict(Counter(f"{name}: {reason}" for name, reason in passed_over))

    def summary_rows(self) -> dict[str, str]:
        """Name -> value of the summary table."""
        manifest = self.manifest
        rows = {"format": f"{manifest.format}, built by qerve {manifest.qerve_version}"}
        rows |= describe_build(manifest.build) | self._scheme_rows()
        rows["effective bits per weight"] = f"{manifest.effective_bits:.3f}"
        rows |= vocabulary_rows(manifest)
        rows["size"] = f"{manifest.artifact_bytes / MIB:.1f} MiB (dense 16-bit: {manifest.dense_bytes / MIB:.1f} MiB)"
        rows |= {f"  {name}": f"{size / MIB:.1f} MiB" for name, size in manifest.component_bytes.items() if size}
        rows |= {f"holdout {name}": f"{value:.4g}" for name, value in manifest.evaluation.items()}
        activations = str(self.dtype).removeprefix("torch.")
        rows |= self.execution.rows()
        for name, count in self.num_layers_by_backend.items():
            rows[f"backend {name}"] = f"{count} linear layers, {activations} activations"
            if name == NativeBackend.name:
                rows[f"backend {name}"] = f"{count} linear layers, integer activations"
        for reason, count in self.reasons.items():
            name, why = reason.split(": ", 1)
            rows[f"not {name}"] = f"{count} linear layers: {why}"
        return rows | {"manifest sha256": manifest.manifest_sha256}

    def _scheme_rows(self) -> dict[str, str]:
        """Number of linear layers by format, where they differ."""
        counts = Counter(describe_scheme(record.scheme) for record in self.manifest.linears.values())
        if len(counts) == 1:
            return {}
        return {f"  {name}": f"{count} linear layers" for name, count in counts.most_common()}

    def layer_rows(self) -> list[tuple[str, ...]]:
        """One row per linear layer: path, bits, group, rank, effective bits, weight and output error, backend."""
        linears = self.manifest.linears
        return [_layer_row(path, linears[path], it) for path, it in self.selections.items() if path in linears]


def inspect_artifact(path: Path, device: str, is_verified: bool, options: RunOptions | None = None) -> Inspection:
    """Validate the artifact in ``path`` and look up the backends that ``device`` would run its layers with.

    Args:
        path: the directory.
        device: ``cpu``, ``cuda``, ``cuda:N``.
        is_verified: every byte is compared with its hash.
        options: as for ``load_artifact``.

    Raises:
        ArtifactError: it is damaged, inconsistent or of another version.
    """
    target, options = torch.device(device), options or RunOptions()
    dtype = default_dtype(target)
    with ArtifactReader.open(path, "full" if is_verified else "structure") as reader:
        backends = get_backends(options.backend, options.activation_bits)
        records = {name: reader.manifest.linears[name] for name in reader.config.linear_shapes()}
        if reader.config.is_head_quantized:
            vocabulary = reader.manifest.vocabulary
            records[HEAD] = vocabulary.get(HEAD) or vocabulary[EMBEDDING]
        selections = {
            name: select_backend(_spec(record, target, dtype), backends, name) for name, record in records.items()
        }
        attention = choose_attention(reader.config, target, dtype).rows() if target.type == "cuda" else {}
        execution = Execution(describe_backends(backends), obstacle_of(reader.config, selections), attention)
        return Inspection(path, reader.manifest, selections, dtype, execution)


def _spec(record: LinearRecord, device: torch.device, dtype: torch.dtype) -> LinearSpec:
    return LinearSpec(
        scheme=record.scheme,
        in_features=record.in_features,
        out_features=record.out_features,
        rank=record.rank,
        has_input_scale=record.has_input_scale,
        has_channel_order=record.has_channel_order,
        device=device,
        dtype=dtype,
        rotation_block=record.rotation_block,
        activations=record.activations,
    )


def _layer_row(path: str, record: LinearRecord, selection: Selection) -> tuple[str, ...]:
    output_error, scheme = record.relative_output_error, record.scheme
    width = str(scheme.num_bits)
    return (
        path.removeprefix("model."),
        {"int": width, "mxint": f"mxint{width}"}.get(scheme.format, scheme.format),
        str(scheme.group_size),
        str(record.rank),
        f"{record.effective_bits:.3f}",
        f"{record.relative_weight_error:.4f}",
        "not measured" if output_error is None else f"{output_error:.4f}",
        selection.backend.name,
    )
