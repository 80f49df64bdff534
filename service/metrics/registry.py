"""The catalogue's metrics as instruments of one registry: counted when something happens, or read when scraped."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .catalogue import CATALOGUE, LENGTHS, PREFIX, Instrument, Kind, length_buckets
from .vllm_names import VllmNames

logger = logging.getLogger("qerve.metrics")

Reading = tuple[dict[str, str], float]
Read = Callable[[], Sequence[Reading]]


class Readings(Collector):
    """A gauge whose values are read when it is scraped; with nothing to read it does not appear.

    A reading that fails costs this gauge, not the scrape.
    """

    def __init__(self, instrument: Instrument, labels: Mapping[str, str], read: Read) -> None:
        self._instrument = instrument
        self._labels = labels
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Its name and meaning, for which nothing is read."""
        yield self._family()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The present values."""
        try:
            readings = self._read()
        except Exception:
            logger.exception("%s cannot be read", self._instrument.exposed_name)
            return
        if readings:
            family = self._family()
            for labels, value in readings:
                family.add_sample(family.name, {**self._labels, **labels}, value)
            yield family

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self._instrument.exposed_name, self._instrument.documentation)


class Instruments:
    """Makes each of the catalogue's metrics that is asked for, with the labels of the served model.

    Counters and histograms without labels of their own are handed out with the model's: looking a child up by its
    labels costs more than counting.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str, max_model_len: int) -> None:
        self._registry = registry
        self._labels = {"model_name": model_name, "engine": "0"}
        self._lengths = length_buckets(max_model_len)
        self._collectors: dict[str, Collector] = {}

    def counter(self, name: str) -> Counter:
        """The counter of the served model, or of HTTP with its labels open."""
        instrument, counter = self._counter(name)
        return counter.labels(**self._labels) if instrument.is_model else counter

    def counters(self, name: str) -> "LabelledCounter":
        """The counters of the served model by the value of their one further label."""
        instrument, counter = self._counter(name)
        return LabelledCounter(counter, self._labels, instrument)

    def histogram(self, name: str) -> Histogram:
        """The histogram of the served model, or of HTTP with its labels open."""
        instrument = _lookup(name, "histogram")
        buckets = self._lengths if instrument.buckets is LENGTHS else instrument.buckets or ()
        labels, registry = instrument.label_names, self._registry
        histogram = Histogram(PREFIX + name, instrument.documentation, labels, registry=registry, buckets=buckets)
        self._collectors[name] = histogram
        return histogram.labels(**self._labels) if instrument.is_model else histogram

    def read(self, name: str, read: Read) -> None:
        """A gauge that ``read`` is asked for at every scrape: its own labels and a value each."""
        instrument = _lookup(name, "gauge")
        readings = Readings(instrument, self._labels if instrument.is_model else {}, read)
        self._registry.register(readings)
        self._collectors[name] = readings

    def export_vllm_names(self) -> None:
        """Offer vLLM's names as well, also of what is made later."""
        self._registry.register(VllmNames(self._collectors))

    def _counter(self, name: str) -> tuple[Instrument, Counter]:
        instrument = _lookup(name, "counter")
        counter = Counter(PREFIX + name, instrument.documentation, instrument.label_names, registry=self._registry)
        self._collectors[name] = counter
        return instrument, counter


class LabelledCounter:
    """A counter of the served model with one further label; of values that are known, all are there from the start."""

    def __init__(self, counter: Counter, labels: Mapping[str, str], instrument: Instrument) -> None:
        (self._label,) = instrument.labels
        self._counter = counter
        self._labels = labels
        self._children = {value: self._make(value) for value in instrument.values}

    def inc(self, value: str, amount: float = 1) -> None:
        """Count ``amount`` under the label's ``value``."""
        child = self._children.get(value)
        if child is None:
            child = self._children[value] = self._make(value)
        child.inc(amount)

    def _make(self, value: str) -> Counter:
        return self._counter.labels(**self._labels, **{self._label: value})


def _lookup(name: str, kind: Kind) -> Instrument:
    instrument = CATALOGUE[name]
    if instrument.kind != kind:
        raise ValueError(f"{name} is a {instrument.kind}, not a {kind}")
    return instrument
