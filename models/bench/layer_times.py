"""Single linear layers on a GPU: every contender on every shape, in rounds, and what their times mean."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .cards import Card
from .contenders import CUBLAS, Contender, made
from .device_clock import DeviceClock
from .probe import SECONDS, Probe, ProbeError, Samples, run_rounds
from .roofline import LayerCost, Scheme, Shape, network_shapes, seconds

Progress = Callable[[int, int], None]
_BF16 = Scheme(16, 0, 16)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One contender on one shape.

    limit_share: the least time of the card as a share of the time taken
    of_cublas:   how many times as fast as cuBLAS with 16 bits
    rank_share:  what the low-rank term adds to the time without it; None: there is none
    """

    shape: Shape
    num_rows: int
    contender: str
    seconds: float
    limit_share: float
    of_cublas: float | None
    rank_share: float | None


def distinct_shapes() -> list[Shape]:
    """Single layers of all networks, each size once."""
    found: dict[tuple[int, int], Shape] = {}
    for shape in network_shapes(("q", "k", "gate", "down")):
        found.setdefault((shape.out_features, shape.in_features), shape)
    return list(found.values())


def metric(shape: Shape, num_rows: int, contender: str) -> str:
    """Name of a time in seconds."""
    return f"{shape.out_features} x {shape.in_features}, M {num_rows}, {contender}"


class LayerBench:
    """All ``contenders`` on all ``shapes`` with inputs of ``batch_sizes`` rows; one shape is in memory at a time."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        shapes: Sequence[Shape],
        batch_sizes: Sequence[int],
        device: torch.device,
        clock: DeviceClock,
    ) -> None:
        self.contenders = contenders
        self.shapes = shapes
        self.batch_sizes = batch_sizes
        self._device = device
        self._clock = clock

    def run(self, repeats: int, progress: Progress = lambda done, total: None) -> Samples:
        """``repeats`` rounds of every shape."""
        samples = Samples()
        for index, shape in enumerate(self.shapes):
            progress(index, len(self.shapes))
            measured = run_rounds(list(self._probes(shape, samples)), repeats)
            samples.values |= measured.values
            samples.units |= measured.units
            samples.failed |= measured.failed
        progress(len(self.shapes), len(self.shapes))
        return samples

    def times(self, samples: Samples, card: Card) -> list[LayerTime]:
        """What ``samples`` mean on ``card``, in the order of shapes, rows and contenders."""
        return [
            found
            for shape in self.shapes
            for num_rows in self.batch_sizes
            for contender in self.contenders
            if (found := self._time(samples, card, shape, num_rows, contender)) is not None
        ]

    def _probes(self, shape: Shape, samples: Samples) -> Iterator[Probe]:
        for contender in self.contenders:
            try:
                run = made(contender, shape, self._device)
            except ProbeError as error:
                samples.failed[f"{shape.out_features} x {shape.in_features}, {contender.name}"] = str(error)
                continue
            for num_rows in self.batch_sizes:
                x = torch.randn(num_rows, shape.in_features, device=self._device).to(torch.bfloat16)
                yield Probe((metric(shape, num_rows, contender.name),), SECONDS, self._timed(run, x))

    def _timed(self, run: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], tuple[float]]:
        def timed() -> tuple[float]:
            try:
                return (self._clock.seconds(lambda: run(x)),)
            except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise ProbeError(f"{type(error).__name__}: {first}") from error

        return timed

    def _time(
        self, samples: Samples, card: Card, shape: Shape, num_rows: int, contender: Contender
    ) -> LayerTime | None:
        name = metric(shape, num_rows, contender.name)
        taken = samples.median(name)
        if taken is None:
            return None
        cost = LayerCost(shape, contender.scheme or _BF16, num_rows, contender.rank)
        bare = next((it for it in self.contenders if it.scheme == contender.scheme and not it.rank), None)
        share = None
        if contender.rank and bare is not None:
            ratio = samples.ratio(name, metric(shape, num_rows, bare.name))
            share = None if ratio is None else ratio - 1
        least = seconds(cost.fused if contender.is_fused else cost.unfused, card)
        of_cublas = samples.ratio(metric(shape, num_rows, CUBLAS), name)
        return LayerTime(shape, num_rows, contender.name, taken, least / taken, of_cublas, share)
