"""Which earlier results and statistics a comparison may take over."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artifact.format import qerve_version
from ..build.recipe import required_statistics
from ..config import BuildConfig, CalibrationConfig
from ..errors import QerveError
from ..llama.checkpoint import file_digest
from ..scheme import ActivationScheme
from ..types import QUANTIZED_STATISTICS
from .config import EvaluationConfig, RecipeConfig

_WHERE_GIVEN = {"activations": asdict(ActivationScheme()), "attention": asdict(ActivationScheme())}
"""Defaults inside what is absent by default; one that has nothing else is still there."""


class Fingerprints:
    """sha256 of everything that a row or the statistics of a build depend on; each file is read once.

    checkpoint: its fingerprint
    device:     kind of device, on which rounding and kernels depend
    """

    def __init__(self, checkpoint: str, evaluation: EvaluationConfig, device: str) -> None:
        self._digests: dict[str, str] = {}
        sources = [text.path for text in evaluation.texts] + [task.task for task in evaluation.tasks]
        described = asdict(evaluation) | {"contents": [self._content(source) for source in sources]}
        self._common = [qerve_version(), checkpoint, device, described]
        self._statistics_common = [qerve_version(), checkpoint, device]

    def dense(self) -> str:
        """Of the dense row."""
        return _sha256(self._common)

    def recipe(self, recipe: RecipeConfig) -> str:
        """Of a recipe's row."""
        chosen = _chosen(recipe.build.to_dict(), BuildConfig().to_dict())
        return _sha256([*self._common, chosen, self._calibration(recipe.build.calibration)])

    def statistics(self, build: BuildConfig) -> str:
        """Of the statistics that ``build`` accumulates: whatever its inputs go through before they are measured.

        Inputs are quantized only for what compares outputs; all other statistics are of inputs as they are.
        """
        parts, defaults = build.to_dict(), BuildConfig().to_dict()
        is_paired = not QUANTIZED_STATISTICS.isdisjoint(required_statistics(build))
        names = ("calibration", "transform", *(["activations"] if is_paired else []))
        parts["calibration"].pop("shrinkage")  # of what is fitted to the statistics, not of them
        settings = _chosen({name: parts[name] for name in names}, defaults)
        return _sha256([*self._statistics_common, settings, self._calibration(build.calibration)])

    def _calibration(self, calibration: CalibrationConfig) -> str:
        return self._content(calibration.source)

    def _content(self, source: str) -> str:
        """Hash of the file ``source``; of its name, where it is no file (a dataset, ``self``)."""
        if source not in self._digests:
            path = Path(source)
            try:
                is_file = bool(source) and path.is_file()
                self._digests[source] = file_digest(path).hex() if is_file else source
            except OSError as error:
                raise QerveError(f"{source}: cannot be read: {error}") from error
        return self._digests[source]


def _chosen(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``values`` without those that are the default: results outlive a setting that a later version adds."""
    chosen = {}
    for name, given in values.items():
        default = defaults.get(name)
        within = _WHERE_GIVEN.get(name) if default is None else default
        value = _chosen(given, within) if isinstance(given, dict) and isinstance(within, dict) else given
        if value != default and (value != {} or default is None):
            chosen[name] = value
    return chosen


def _sha256(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
