"""One exposition of the metrics of several replicas."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.replica_metrics import MergedRegistry


def exposition(count: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests", ["path"], registry=registry).labels("/a").inc(count)
    Histogram("seconds", "Duration", registry=registry, buckets=(1, 2)).observe(count)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(it.name, tuple(sorted(it.labels.items()))): it.value for family in families for it in family.samples}


def test_every_sample_of_every_replica_is_there_under_its_name_and_nothing_else() -> None:
    parts = {"one": exposition(1), "two": exposition(2)}
    found = samples(generate_latest(MergedRegistry(lambda: parts)).decode())
    wanted = {
        (name, tuple(sorted((*labels, ("replica", replica))))): value
        for replica, text in parts.items()
        for (name, labels), value in samples(text).items()
    }
    assert found == wanted
    assert found["requests_total", (("path", "/a"), ("replica", "two"))] == 2


def test_a_family_is_described_once() -> None:
    text = generate_latest(MergedRegistry(lambda: {"one": exposition(1), "two": exposition(2)})).decode()
    assert text.count("# TYPE requests_total counter") == 1
    assert text.count("# HELP seconds Duration") == 1


def test_replicas_are_asked_at_every_scrape() -> None:
    answers = iter([{"one": exposition(1)}, {}])
    registry = MergedRegistry(lambda: next(answers))
    assert "requests_total" in generate_latest(registry).decode()
    assert generate_latest(registry) == b""
