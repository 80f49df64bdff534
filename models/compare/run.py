"""The comparison: dense first, then every recipe built, measured, written down and, unless it is kept, removed.

Each row is on disk as soon as it is measured, so that a comparison that was interrupted, or was given more recipes,
goes on with what is missing; within a recipe its build goes on after the last finished layer. Statistics of inputs from
the dense network are collected once and shared.
"""

import shutil
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from ..artifact.format import qerve_version
from ..artifact.reader import ArtifactReader
from ..artifact.record import LinearRecord
from ..build import build_artifact
from ..build.plan import check_build
from ..calibration.store import StatisticsStore
from ..errors import CalibrationError, QerveError, SchemeError
from ..evaluate.load import parse_device
from ..llama.checkpoint import Checkpoint, open_checkpoint
from ..memory import directory_bytes, return_freed_memory
from ..report.result import DENSE, CacheUse, Comparison, LayerScore, RecipeResult
from .config import CompareConfig, RecipeConfig
from .evaluate import Evaluation
from .fingerprint import Fingerprints
from .observer import CompareObserver, SilentCompareObserver
from .spectra import error_spectra
from .storage import ResultDirectory


def compare(
    config: CompareConfig,
    out: Path,
    *,
    device: str = "cpu",
    observer: CompareObserver | None = None,
    header: dict[str, str] | None = None,
) -> Comparison:
    """Measure every row of ``config`` that ``out`` does not hold already.

    A recipe that fails is a row with its error, and the next one follows.

    Args:
        config: what to compare.
        out: directory for results, statistics and artifacts.
        device: ``cpu``, ``cuda``, ``cuda:N``.
        observer: is told of the progress.
        header: further lines for the head of the report.

    Raises:
        SchemeError: a recipe cannot be carried out; found before anything runs, names it.
        CheckpointError, EvaluationError, CalibrationError: the checkpoint, a text, a task or a calibration file cannot
            be read.
    """
    parse_device(device)
    checkpoint = open_checkpoint(config.checkpoint)
    recipes = config.expanded()
    for recipe in recipes:
        check_recipe(recipe, checkpoint)
    evaluation = Evaluation(config.evaluation, device)
    prints = Fingerprints(checkpoint.fingerprint, config.evaluation, device.partition(":")[0])
    runner = _Runner(config, out, checkpoint, evaluation, prints, device, observer or SilentCompareObserver())
    rows = [None, *recipes]
    results = tuple(runner.row(recipe, number, len(rows)) for number, recipe in enumerate(rows, start=1))
    described = {
        "checkpoint": config.checkpoint,
        "checkpoint sha256": checkpoint.fingerprint,
        "qerve": qerve_version(),
        **(header or {}),
    }
    title = config.title or f"Recipes for {Path(config.checkpoint).name}"
    return Comparison(title, described, results, config.external_results())


def check_recipe(recipe: RecipeConfig, checkpoint: Checkpoint) -> None:
    """Raise SchemeError or CalibrationError, naming the recipe, when it cannot be carried out."""
    try:
        check_build(recipe.build, checkpoint.config)
    except SchemeError as error:
        raise SchemeError(f"recipe {recipe.name}: {error}") from error
    source = recipe.build.calibration.source
    if source not in {"self", "none"} and not source.startswith("hf:") and not Path(source).is_file():
        raise CalibrationError(f"recipe {recipe.name}: calibration source {source}: no such file")


@dataclass(frozen=True, slots=True)
class _Runner:
    config: CompareConfig
    out: Path
    checkpoint: Checkpoint
    evaluation: Evaluation
    prints: Fingerprints
    device: str
    observer: CompareObserver

    def row(self, recipe: RecipeConfig | None, number: int, total: int) -> RecipeResult:
        """The dense row (``recipe`` None) or a recipe's: as it is on disk, or measured now."""
        name = DENSE if recipe is None else recipe.name
        fingerprint = self.prints.dense() if recipe is None else self.prints.recipe(recipe)
        known = ResultDirectory(self.out).read(name)
        if known is not None and self._is_final(known, fingerprint):
            self.observer.row_finished(known, is_reused=True)
            return known
        self.observer.row_started(name, number, total)
        build = None if recipe is None else recipe.build.to_dict()
        empty = RecipeResult(name, fingerprint, qerve_version(), config=build)
        try:
            result = self._dense(empty) if recipe is None else self._built(empty, recipe)
        except Exception as error:  # a defect or lack of memory in one row must not lose the others
            result = replace(empty, error=_described(error))
        return_freed_memory()
        ResultDirectory(self.out).write(result)
        self.observer.row_finished(result, is_reused=False)
        return result

    def _is_final(self, known: RecipeResult, fingerprint: str) -> bool:
        has_artifact = known.is_dense or not self.config.keep_artifacts or self._artifact(known.name).is_dir()
        return known.fingerprint == fingerprint and known.error is None and has_artifact

    def _dense(self, empty: RecipeResult) -> RecipeResult:
        scores = self.evaluation.measure(self.config.checkpoint, self.observer)
        return replace(
            empty,
            texts=scores.texts,
            tasks=scores.tasks,
            eval_seconds=scores.seconds,
            effective_bits=16.0,
            artifact_bytes=self.checkpoint.dense_bytes,
        )

    def _built(self, empty: RecipeResult, recipe: RecipeConfig) -> RecipeResult:
        path, store = self._artifact(recipe.name), self._store(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        report = build_artifact(
            self.checkpoint,
            path,
            recipe.build,
            device=self.device,
            overwrite=True,
            observer=self.observer,
            statistics=store,
        )
        use = _cache_use(store)
        with ArtifactReader.open(path, "structure") as artifact:
            layers = {name: _layer_score(record) for name, record in artifact.manifest.linears.items()}
            self.observer.phase("singular values", 1)
            spectra = error_spectra(self.checkpoint, artifact, store)
        scores = self.evaluation.measure(str(path), self.observer)
        num_bytes = directory_bytes(path)
        if not self.config.keep_artifacts:
            shutil.rmtree(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        return replace(
            empty,
            texts=scores.texts,
            tasks=scores.tasks,
            eval_seconds=scores.seconds,
            effective_bits=report.effective_bits,
            artifact_bytes=num_bytes,
            build_seconds=report.seconds,
            peak_memory_bytes=max(report.peak_memory_bytes, report.preparation_peak_bytes),
            statistics=use,
            layers=layers,
            spectra=spectra,
        )

    def _artifact(self, name: str) -> Path:
        return self.out / "artifacts" / name

    def _store(self, recipe: RecipeConfig) -> StatisticsStore | None:
        """Statistics of dense inputs do not depend on how the layers before are quantized."""
        calibration = recipe.build.calibration
        if calibration.inputs != "dense" or calibration.source == "none":
            return None
        fingerprint = self.prints.statistics(recipe.build)
        return StatisticsStore(self.out / "statistics" / fingerprint[:16], fingerprint)


def _layer_score(record: LinearRecord) -> LayerScore:
    return LayerScore(
        format=record.scheme.format,
        num_bits=record.scheme.num_bits,
        group_size=record.scheme.group_size,
        rank=record.rank,
        effective_bits=record.effective_bits,
        weight_error=record.relative_weight_error,
        output_error=record.relative_output_error,
    )


def _cache_use(store: StatisticsStore | None) -> CacheUse:
    if store is None or not (store.num_loaded or store.num_saved):
        return "none"
    if not store.num_loaded:
        return "collected"
    return "partly cached" if store.num_saved else "cached"


def _described(error: Exception) -> str:
    if isinstance(error, QerveError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
