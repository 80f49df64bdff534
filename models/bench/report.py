"""What a bench found, as rows of tables and as one JSON object."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .aims import Aim
from .layer_times import LayerTime
from .llama import llama_metric
from .probe import Samples

RANK_0 = "rank 0"
KERNELS_ONLY = "kernels only"
HTTP = "HTTP"
ENGINE = "engine"
MISSING = "-"


@dataclass(frozen=True, slots=True)
class Limit:
    """What bounds a workload.

    least_seconds: of one step at the peaks measured in the same run
    num_tokens:    that a step takes in or gives
    """

    least_seconds: float
    num_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """The rate that nothing can exceed."""
        return self.num_tokens / self.least_seconds


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator in one phase.

    num_bytes, multiply_adds: of a step; None: not to be compared with a peak
    bytes_share, multiply_adds_share: of the peaks
    """

    phase: str
    operator: str
    seconds: float
    num_bytes: int | None = None
    multiply_adds: int | None = None
    bytes_share: float | None = None
    multiply_adds_share: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a bench found.

    about:     what was measured, where and how, in words
    workloads: metrics of the artifact's own speeds, in the order of the table
    streams:   metrics of whole requests, without and with HTTP; None: not measured
    limits:    by workload
    missing:   what was not measured, and why
    layers:    single layers on a GPU
    aims:      what a GPU is meant to reach
    """

    about: Mapping[str, str]
    samples: Samples
    workloads: Sequence[str]
    streams: tuple[str, str] | None = None
    limits: Mapping[str, Limit] = field(default_factory=dict)
    operators: Sequence[OperatorTime] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    layers: Sequence[LayerTime] = ()
    aims: Sequence[Aim] = ()

    def limit_share(self, workload: str) -> float | None:
        """Rate of ``workload`` as a share of its limit."""
        limit, rate = self.limits.get(workload), self.samples.median(workload)
        return None if limit is None or rate is None else rate / limit.tokens_per_second

    def python_share(self, workload: str) -> float | None:
        """Share of the time of ``workload`` that passes outside the kernels."""
        ratio = self.samples.ratio(workload, f"{workload}, {KERNELS_ONLY}")
        return None if ratio is None else 1 - ratio

    def low_rank_share(self, workload: str) -> float | None:
        """Share of the time of ``workload`` that the low-rank terms take."""
        ratio = self.samples.ratio(workload, f"{workload}, {RANK_0}")
        return None if ratio is None else 1 - ratio

    def ratios(self) -> dict[str, float]:
        """Of speeds within rounds: to llama.cpp, of HTTP to the engine."""
        pairs = []
        for workload in self.workloads:
            other = llama_metric(workload)
            pairs += [(workload, other), (f"{workload}, {RANK_0}", other)]
        if self.streams is not None:
            pairs.append((self.streams[1], self.streams[0]))
        found = {f"{above} / {below}": self.samples.ratio(above, below) for above, below in pairs}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: medians, spreads and every round of every metric, shares, ratios, limits."""
        samples = self.samples
        shares = {
            workload: {
                "python": self.python_share(workload),
                "low_rank": self.low_rank_share(workload),
                "of_limit": self.limit_share(workload),
            }
            for workload in self.workloads
            if workload in samples.values
        }
        return {
            "about": dict(self.about),
            "metrics": {
                metric: {
                    "unit": samples.units[metric],
                    "median": samples.median(metric),
                    "spread": samples.spread(metric),
                    "values": values,
                }
                for metric, values in samples.values.items()
            },
            "ratios": self.ratios(),
            "shares": shares,
            "limits": {name: limit.tokens_per_second for name, limit in self.limits.items()},
            "operators": [
                {name: getattr(row, name) for name in OperatorTime.__dataclass_fields__} for row in self.operators
            ],
            "layers": [asdict(row) for row in self.layers],
            "aims": [aim.to_dict() for aim in self.aims],
            "not_measured": {**self.missing, **samples.failed},
        }


def speed_columns(report: Report) -> list[tuple[str, list[str]]]:
    """Heading and cells of each column of the table of speeds; columns without any value are left out."""
    samples = report.samples
    rows = [name for name in report.workloads if name in samples.values or llama_metric(name) in samples.values]
    ratios = report.ratios()

    def rates(suffix: str = "") -> list[str]:
        return [number(samples.median(f"{name}{suffix}")) for name in rows]

    columns = [
        ("tokens/s", rows),
        ("engine", rates()),
        ("spread", [percent(samples.spread(name)) for name in rows]),
        (KERNELS_ONLY, rates(f", {KERNELS_ONLY}")),
        ("Python", [percent(report.python_share(name)) for name in rows]),
        ("of the limit", [percent(report.limit_share(name)) for name in rows]),
        (RANK_0, rates(f", {RANK_0}")),
        ("low-rank", [percent(report.low_rank_share(name)) for name in rows]),
        ("llama.cpp", [number(samples.median(llama_metric(name))) for name in rows]),
        ("engine : llama.cpp", [times(ratios.get(f"{name} / {llama_metric(name)}")) for name in rows]),
        (f"{RANK_0} : llama.cpp", [times(ratios.get(f"{name}, {RANK_0} / {llama_metric(name)}")) for name in rows]),
    ]
    return [(heading, cells) for heading, cells in columns if any(cell != MISSING for cell in cells)]


def operator_cells(rows: Sequence[OperatorTime]) -> list[list[str]]:
    """Cells of the table of operators: phase, operator, ms, share of its phase, MB, GB/s, of peak, GMAC/s, of peak."""
    totals: dict[str, float] = {}
    for row in rows:
        if row.num_bytes is not None:
            totals[row.phase] = totals.get(row.phase, 0.0) + row.seconds
    return [
        [
            row.phase,
            row.operator,
            f"{row.seconds * 1e3:.3f}",
            percent(row.seconds / totals[row.phase]),
            MISSING if row.num_bytes is None else f"{row.num_bytes / 1e6:.1f}",
            MISSING if row.num_bytes is None else f"{row.num_bytes / row.seconds / 1e9:.1f}",
            percent(row.bytes_share),
            MISSING if row.multiply_adds is None else f"{row.multiply_adds / row.seconds / 1e9:.0f}",
            percent(row.multiply_adds_share),
        ]
        for row in rows
    ]


def layer_cells(rows: Sequence[LayerTime]) -> list[list[str]]:
    """Cells of the table of layers: layer, M, way, us, of the limit, of cuBLAS, low-rank."""
    return [
        [
            f"{row.shape.out_features} x {row.shape.in_features}",
            str(row.num_rows),
            row.contender,
            f"{row.seconds * 1e6:.1f}",
            percent(row.limit_share),
            times(row.of_cublas),
            percent(row.rank_share),
        ]
        for row in rows
    ]


def aim_cells(rows: Sequence[Aim]) -> list[list[str]]:
    """Cells of the table of aims: aim, wanted, measured, met."""
    verdict = {None: "not measured", True: "yes", False: "no"}
    return [[row.name, row.wanted, percent(row.value), verdict[row.is_met]] for row in rows]


def number(value: float | None) -> str:
    """Four significant digits at most."""
    return MISSING if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def times(value: float | None) -> str:
    """A ratio."""
    return MISSING if value is None else f"{value:.2f}x"
