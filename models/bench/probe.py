"""Probes, and how they take turns: one repetition of each after the other, so that all see the same machine.

A machine changes its speed within seconds (turbo, temperature, neighbours). What is compared is therefore measured in
the same round, and a ratio is the median of the ratios within rounds, not the ratio of two medians.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import QerveError

TOKENS_PER_SECOND = "tokens/s"
SECONDS = "s"
BYTES_PER_SECOND = "bytes/s"
MULTIPLY_ADDS_PER_SECOND = "multiply-adds/s"
OPERATIONS_PER_SECOND = "operations/s"


class ProbeError(QerveError):
    """A probe cannot be measured here; the others go on without it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to measure again and again.

    metrics: names of what ``run`` gives, unique in a bench
    run:     one repetition; one value per metric. Raises ProbeError where it cannot go on
    """

    metrics: tuple[str, ...]
    unit: str
    run: Callable[[], Sequence[float]]


@dataclass(slots=True)
class Samples:
    """What rounds gave.

    values: by metric, one value per round
    units:  by metric
    failed: by metric of a probe that could not go on, why
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, metric: str) -> float | None:
        """Median over the rounds; None: it was not measured."""
        values = self.values.get(metric)
        return statistics.median(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Largest minus smallest value, as a share of the median; None: it was not measured."""
        values, median = self.values.get(metric), self.median(metric)
        return (max(values) - min(values)) / median if values and median else None

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """Median of the ratios within rounds; None: one of them was not measured."""
        above, below = self.values.get(numerator), self.values.get(denominator)
        if not above or not below or not all(below):
            return None
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    def record(self, probe: Probe, values: Sequence[float]) -> None:
        """Add a round of ``probe``.

        Raises:
            ValueError: as many values as metrics are needed, each of them finite.
        """
        for metric, value in zip(probe.metrics, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"{metric} is {value}")
            self.values.setdefault(metric, []).append(value)
            self.units[metric] = probe.unit

    def drop(self, probe: Probe, reason: str) -> None:
        """Forget ``probe``: its rounds would not be those of the others."""
        for metric in probe.metrics:
            self.values.pop(metric, None)
            self.failed[metric] = reason


def run_rounds(
    probes: Sequence[Probe], repeats: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Samples:
    """``repeats`` rounds of all ``probes`` in turn, after one round that does not count.

    Args:
        probes: in the order of each round.
        repeats: rounds that count.
        progress: is told how many of how many repetitions are done.
    """
    samples, left = Samples(), list(probes)
    total = len(left) * (repeats + 1)
    for round_index in range(repeats + 1):
        for index, probe in enumerate(tuple(left)):
            progress(round_index * len(probes) + index, total)
            try:
                values = probe.run()
            except ProbeError as error:
                samples.drop(probe, str(error))
                left.remove(probe)
                continue
            if round_index:
                samples.record(probe, values)
    progress(total, total)
    return samples
