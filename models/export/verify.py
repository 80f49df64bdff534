"""The proof beside an export: its files read back by other code, run on a text, compared with the artifact.

``verification.json`` holds what was measured, the reference's nll of every token of the text, and the hash of every
file, so that ``qerve export verify`` can repeat it with or without the artifact. Both networks run layer by layer in
float32: one decoder layer of each is in memory at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..artifact.format import Manifest, qerve_version
from ..artifact.reader import ArtifactReader
from ..errors import CheckpointError, ExportError
from ..kernels import get_backends
from ..layers.linear import LowRankLinear
from ..llama.batch import Batch
from ..llama.config import LlamaConfig
from ..llama.config_fields import read_json_object
from ..llama.model import DecoderLayer, RMSNorm, embed, head_logits
from ..llama.rope import RotaryEmbedding
from ..llama.tokenizer import Tokenizer
from ..llama.weights import WeightSource
from ..scheme import EMBEDDING
from .files import VERIFICATION_FILE, file_records, write_json
from .reread import Layout, relative_error, reread
from .source import ExportSource, dense_weight

FORMAT = "qerve-export-1"
PROBE_TOKENS = 256
TOLERANCE = 1e-3
"""Nats by which a repeated measurement may differ from the first: another machine sums in another order."""

_TEXT = (
    "The river runs past the old mill, and nobody has counted the boats since the bridge was built. In the morning the "
    "light comes over the hills; by noon 24 people have crossed, and most of them ask the same question. "
) * 6


@dataclass(frozen=True, slots=True)
class Verification:
    """What the comparison came to.

    reference_nll, export_nll: nats per token of the probe text, of the artifact and of the files that were read back
    max_logprob_difference:    largest over the text's tokens and the whole vocabulary; None: compared without artifact
    max_nll_difference:        largest over the text's tokens, of the tokens that follow
    top1_agreement:            share of positions where both find the same token likeliest; None as above
    worst_weight_error:        largest relative error of a layer's weight, correction included; None as above
    worst_layer:               whose that is
    notes:                     what is knowingly different, in words
    """

    reference_nll: float
    export_nll: float
    max_nll_difference: float
    max_logprob_difference: float | None
    top1_agreement: float | None
    worst_weight_error: float | None
    worst_layer: str | None
    notes: tuple[str, ...]

    def rows(self) -> dict[str, str]:
        """As a table shows it."""
        rows = {
            "nll of the probe text": f"{self.export_nll:.6f} nats per token (artifact {self.reference_nll:.6f})",
            "largest difference of a token's nll": f"{self.max_nll_difference:.2e}",
        }
        if self.max_logprob_difference is not None and self.worst_weight_error is not None:
            rows["largest difference of a log-probability"] = f"{self.max_logprob_difference:.2e}"
            rows["likeliest token the same"] = f"{self.top1_agreement:.1%} of positions"
            rows["largest relative weight error"] = f"{self.worst_weight_error:.2e} ({self.worst_layer})"
        return rows | {f"note {number}": note for number, note in enumerate(self.notes, start=1)}


class ReferenceWeights:
    """The ``WeightSource`` over an artifact: the specification's layers, inputs unquantized, everything float32."""

    def __init__(self, source: ExportSource) -> None:
        self._source = source

    def tensor(self, name: str) -> Tensor:
        """A dense parameter, float32."""
        return self._source.tensor(name).float()

    def linear(self, path: str) -> nn.Module:
        """The linear layer at ``path``, run by the reference backend."""
        weights = replace(self._source.reader.linear(path), activations=None)
        backends = get_backends("reference")
        return LowRankLinear.of(weights, backends, device=torch.device("cpu"), dtype=torch.float32, where=path)


@torch.inference_mode()
def layerwise_logits(config: LlamaConfig, weights: WeightSource, token_ids: Tensor) -> Tensor:
    """Logits (n, vocab_size) float32 of ``token_ids`` (n,), one decoder layer in memory at a time."""
    batch = Batch.uncached(token_ids[None], torch.device("cpu"))
    rotary = RotaryEmbedding(config, torch.device("cpu"))(batch, torch.float32)
    hidden = embed(token_ids, weights.tensor(f"{EMBEDDING}.weight"), torch.float32)
    for index in range(config.num_hidden_layers):
        hidden = DecoderLayer(config, index, weights)(hidden, batch, rotary)
    hidden = RMSNorm(weights.tensor("model.norm.weight"), config.rms_norm_eps)(hidden)
    return head_logits(hidden, weights.tensor(config.head_name))


def prove(directory: Path, layout: Layout, source: ExportSource, notes: list[str]) -> Verification:
    """Read the export in ``directory`` back, compare it with ``source``, and write ``verification.json`` beside it."""
    token_ids = probe_tokens(source)
    result, nlls = compare(directory, layout, source, token_ids, (*notes, *source.notes()))
    values = {
        "format": FORMAT,
        "qerve_version": qerve_version(),
        "layout": {"target": layout.target, "base": layout.base, "adapter": layout.adapter},
        "artifact_sha256": source.manifest.manifest_sha256,
        "token_ids": token_ids.tolist(),
        "reference_token_nlls": [round(float(value), 6) for value in nlls],
        "measured": {name: getattr(result, name) for name in _MEASURED},
        "notes": list(result.notes),
        "files": file_records(directory),
    }
    write_json(directory / VERIFICATION_FILE, values)
    return result


_MEASURED = (
    "reference_nll",
    "export_nll",
    "max_nll_difference",
    "max_logprob_difference",
    "top1_agreement",
    "worst_weight_error",
    "worst_layer",
)


def compare(
    directory: Path, layout: Layout, source: ExportSource, token_ids: Tensor, notes: tuple[str, ...]
) -> tuple[Verification, Tensor]:
    """The export against the artifact; also the reference's nll (n - 1,) of the text's tokens."""
    weights = reread(directory, layout)
    errors = {path: relative_error(dense_weight(it), weights.weight(path)) for path, it in source.linears()}
    worst = max(errors, key=lambda path: errors[path])
    expected = layerwise_logits(source.config, ReferenceWeights(source), token_ids).log_softmax(-1)
    found = layerwise_logits(weights.config, weights, token_ids).log_softmax(-1)
    nlls, found_nlls = _nlls(expected, token_ids), _nlls(found, token_ids)
    result = Verification(
        reference_nll=float(nlls.double().mean()),
        export_nll=float(found_nlls.double().mean()),
        max_nll_difference=float((nlls - found_nlls).abs().max()),
        max_logprob_difference=float((expected - found).abs().max()),
        top1_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        worst_weight_error=errors[worst],
        worst_layer=worst,
        notes=notes,
    )
    return result, nlls


def verify_export(directory: Path, artifact: Path | None = None) -> Verification:
    """Repeat the proof of the export in ``directory``; with ``artifact``, from the artifact on.

    Raises:
        ExportError: a file changed, or the network is not what it was when the export was written.
        ArtifactError: the artifact cannot be read.
    """
    values = _read_proof(directory)
    _check_files(directory, values["files"])
    layout = Layout(**values["layout"])
    token_ids = torch.tensor(values["token_ids"])
    if artifact is not None:
        with ArtifactReader.open(artifact) as reader:
            _check_artifact(reader.manifest, values, artifact)
            result, _ = compare(directory, layout, ExportSource(reader), token_ids, tuple(values["notes"]))
    else:
        result = _compare_stored(directory, layout, token_ids, values)
    allowed = values["measured"]["max_nll_difference"] + TOLERANCE
    if not result.max_nll_difference <= allowed:
        raise ExportError(
            f"{directory}: a token's nll differs by {result.max_nll_difference:.2e} nats from the artifact's, but by "
            f"{values['measured']['max_nll_difference']:.2e} when it was written; export it again"
        )
    return result


def _compare_stored(directory: Path, layout: Layout, token_ids: Tensor, values: Mapping[str, Any]) -> Verification:
    weights = reread(directory, layout)
    found = _nlls(layerwise_logits(weights.config, weights, token_ids).log_softmax(-1), token_ids)
    nlls = torch.tensor(values["reference_token_nlls"])
    return Verification(
        reference_nll=float(nlls.double().mean()),
        export_nll=float(found.double().mean()),
        max_nll_difference=float((nlls - found).abs().max()),
        max_logprob_difference=None,
        top1_agreement=None,
        worst_weight_error=None,
        worst_layer=None,
        notes=tuple(values["notes"]),
    )


def probe_tokens(source: ExportSource) -> Tensor:
    """The text to compare by: the beginning of the build's holdout, or a text of our own; (n,) int64.

    Raises:
        ExportError: there was no holdout, and the tokenizer cannot be used.
    """
    probe = source.manifest.probe
    if probe is not None:
        return torch.tensor(probe.token_ids[:PROBE_TOKENS])
    try:
        tokenizer = Tokenizer.from_files(source.reader.tokenizer_files)
    except CheckpointError as error:
        raise ExportError(
            f"{source.reader.path}: its tokenizer cannot be used to make a probe text: {error}"
        ) from error
    limit = min(PROBE_TOKENS, source.config.max_position_embeddings)
    return torch.tensor(tokenizer.encode(_TEXT)[:limit])


def _nlls(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    return F.nll_loss(logprobs[:-1], token_ids[1:], reduction="none")


def _read_proof(directory: Path) -> dict[str, Any]:
    try:
        values = read_json_object(directory / VERIFICATION_FILE)
    except CheckpointError as error:
        raise ExportError(f"{directory}: is no export: {error}") from error
    if values.get("format") != FORMAT:
        raise ExportError(f"{directory / VERIFICATION_FILE}: format {values.get('format')!r}, expected {FORMAT!r}")
    return values


def _check_files(directory: Path, recorded: Mapping[str, Any]) -> None:
    found = file_records(directory)
    for name in sorted(recorded.keys() | found.keys()):
        if found.get(name) != recorded.get(name):
            what = "is missing" if name not in found else "was added" if name not in recorded else "has changed"
            raise ExportError(f"{directory / name}: {what} since the export was written; export it again")


def _check_artifact(manifest: Manifest, values: Mapping[str, Any], artifact: Path) -> None:
    if manifest.manifest_sha256 != values["artifact_sha256"]:
        raise ExportError(f"{artifact}: is not the artifact that the export was made of")
