"""What a comparison knows about each of its recipes: plain data, in JSON and out of it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

DENSE = "dense"
"""Name of the row of the checkpoint itself."""

CacheUse = Literal["none", "collected", "partly cached", "cached"]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Perplexity of one text; nll: mean in nats per token, None: it is not a number."""

    text: str
    nll: float | None
    num_tokens: int
    num_windows: int

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite when that does not fit a float or the network puts out no numbers."""
        if self.nll is None:
            return math.inf
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task: accuracies from 0 to 1 with their standard errors; None: not defined for it."""

    task: str
    num_rows: int
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True, slots=True)
class LayerScore:
    """One linear layer: what it became, and its relative errors (Frobenius); output_error None: not calibrated."""

    format: str
    num_bits: int
    group_size: int
    rank: int
    effective_bits: float
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Largest singular values of a layer's quantization error before its correction, and what all of them add up to.

    plain:    of E = W - W' ; weighted: of ``R^(1/2) E^T`` with R the autocorrelation of the layer's inputs, whose
        square sum is the mean square error of its outputs; empty: no statistics at hand
    plain_total, weighted_total: sums of the squares of all singular values, of which only the largest are listed
    """

    plain: tuple[float, ...]
    plain_total: float
    weighted: tuple[float, ...] = ()
    weighted_total: float = 0.0


@dataclass(frozen=True, slots=True)
class RecipeResult:
    """One row of a comparison.

    fingerprint:    of all that decides the result; the row is measured again when it changes
    error:          why there are no measurements; None: there are
    config:         the build's configuration; None for the dense row
    effective_bits: stored bits per weight over the linear layers; of the dense row those of its storage
    artifact_bytes: size of all files; of the dense row that of its parameters
    build_seconds:  with statistics, unless ``statistics`` says that they came from the cache
    peak_memory_bytes: most that the build held above what the process held before
    """

    name: str
    fingerprint: str
    qerve_version: str
    error: str | None = None
    config: dict[str, Any] | None = None
    texts: tuple[TextScore, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    effective_bits: float | None = None
    artifact_bytes: int | None = None
    build_seconds: float | None = None
    eval_seconds: float | None = None
    peak_memory_bytes: int | None = None
    statistics: CacheUse = "none"
    layers: dict[str, LayerScore] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """The checkpoint itself."""
        return self.name == DENSE

    def perplexity(self, text: str) -> float | None:
        """Perplexity of ``text``; None: not measured."""
        return next((score.perplexity for score in self.texts if score.text == text), None)

    @property
    def output_error(self) -> float | None:
        """Root mean square of the layers' relative output errors; None: not calibrated."""
        errors = [score.output_error for score in self.layers.values() if score.output_error is not None]
        return math.sqrt(math.fsum(error * error for error in errors) / len(errors)) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ExternalResult:
    """A result that was not measured by this comparison; ``mark`` says where it is from."""

    name: str
    effective_bits: float
    perplexity: float
    text: str
    mark: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that the report shows.

    results:  dense first, then the recipes in the order of the configuration
    external: never mixed with the measured ones
    header:   name -> value, shown at the top
    """

    title: str
    header: dict[str, str]
    results: tuple[RecipeResult, ...]
    external: tuple[ExternalResult, ...] = ()

    @property
    def dense(self) -> RecipeResult | None:
        """The row of the checkpoint itself, if it could be measured."""
        return next((result for result in self.measured if result.is_dense), None)

    @property
    def measured(self) -> list[RecipeResult]:
        """Rows that have measurements."""
        return [result for result in self.results if result.error is None]

    @property
    def recipes(self) -> list[RecipeResult]:
        """Measured rows without the dense one."""
        return [result for result in self.measured if not result.is_dense]

    @property
    def texts(self) -> list[str]:
        """Names of the texts, in order."""
        return list(dict.fromkeys(score.text for result in self.measured for score in result.texts))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(dict.fromkeys(score.task for result in self.measured for score in result.tasks))
