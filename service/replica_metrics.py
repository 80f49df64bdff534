"""The metrics of several replicas as one exposition: the same samples, told apart by a label."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

LABEL = "replica"


class MergedRegistry(CollectorRegistry):
    """Reads the metrics of all replicas whenever it is scraped.

    gather: replica's name -> its metrics in Prometheus's text format
    """

    def __init__(self, gather: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._gather = gather

    def collect(self) -> Iterator[Metric]:
        """Every sample of every replica, with its name as the label ``replica``."""
        families: dict[str, Metric] = {}
        for replica, text in self._gather().items():
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [it._replace(labels={**it.labels, LABEL: replica}) for it in family.samples]
        return iter(families.values())
