"""What the server tells about the model it serves, taken once from the artifact's manifest."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from models.artifact.describe import (
    describe_budget,
    describe_quantizer,
    describe_scheme,
    describe_transform,
    describe_vocabulary,
)
from models.artifact.format import FORMAT, Manifest
from models.kernels.base import Selection


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model: its name, its manifest, the backends that run its layers, and how they run it in words."""

    name: str
    max_model_len: int
    manifest: Manifest
    selections: Mapping[str, Selection]
    execution: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """``system_fingerprint`` of every response: which artifact answered."""
        return f"qerve-{self.manifest.manifest_sha256[:16]}"

    @property
    def backends(self) -> dict[str, int]:
        """Backend name -> number of layers it runs."""
        return dict(Counter(selection.backend.name for selection in self.selections.values()))

    @property
    def rank(self) -> int:
        """Largest rank of a correction."""
        return max((record.rank for record in self.manifest.linears.values()), default=0)

    @property
    def ranks(self) -> list[dict[str, int]]:
        """The distinct ranks of corrections and the number of layers that have them, the most used first."""
        counts = Counter(record.rank for record in self.manifest.linears.values())
        return [{"rank": rank, "num_layers": num_layers} for rank, num_layers in counts.most_common()]

    @property
    def schemes(self) -> list[dict[str, Any]]:
        """The distinct weight formats, the most used first."""
        counts = Counter(record.scheme for record in self.manifest.linears.values())
        return [asdict(scheme) for scheme, _ in counts.most_common()]

    def listing(self) -> dict[str, Any]:
        """The model as OpenAI clients list it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qerve",
            "root": self.name,
            "parent": None,
            "max_model_len": self.max_model_len,
        }

    def card(self) -> dict[str, Any]:
        """``listing`` with how the model was made and how it is run."""
        manifest, build = self.manifest, self.manifest.build
        return {
            **self.listing(),
            "artifact": {
                "format": FORMAT,
                "sha256": manifest.manifest_sha256,
                "qerve_version": manifest.qerve_version,
                "method": build.reconstruct.method,
                "quantizer": describe_quantizer(build.quantizer),
                "activations": None if build.activations is None else describe_scheme(build.activations),
                "attention": None if build.attention is None else describe_scheme(build.attention),
                "transform": describe_transform(build.transform),
                "objective": build.objective,
                "budget": None if build.budget is None else describe_budget(build.budget),
                "rank": self.rank,
                "ranks": self.ranks,
                "schemes": self.schemes,
                "effective_bits": manifest.effective_bits,
                **{name: asdict(part) for name, part in describe_vocabulary(manifest).items()},
                "component_bytes": dict(manifest.component_bytes),
                "dense_bytes": manifest.dense_bytes,
                "evaluation": dict(manifest.evaluation),
                "has_probe": manifest.probe is not None,
            },
            "backends": self.backends,
            "passed_over": self._passed_over(),
            "execution": dict(self.execution),
        }

    def _passed_over(self) -> list[dict[str, Any]]:
        """Backends that were preferred but not chosen, with the reason and the number of layers it holds for."""
        reasons = Counter(reason for selection in self.selections.values() for reason in selection.passed_over)
        return [
            {"backend": backend, "reason": reason, "num_layers": num_layers}
            for (backend, reason), num_layers in reasons.most_common()
        ]
