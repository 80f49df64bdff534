"""What metrics and the log cost: eight streams from two servers of one model, in turns, one of which counts nothing.

    python -m tests.bench.telemetry artifacts/demo

One server has everything on: metrics that are scraped every few seconds, and a JSON line per request that goes to
/dev/null. The other one's events go nowhere and its log is off. Rounds run in the order ABBA; what counts is the median
of the ratios within rounds, of the rate that the client sees and of the processor time of the server's process. Run it
with nothing else running. Ends with one line of JSON.
"""

import gc
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import QueueListener
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from prometheus_client import generate_latest

from models.artifact.load import load_artifact
from models.bench.probe import Probe
from models.bench.workload import Workload
from service.bench.http import http_probe
from service.logs import DescriptorHandler, DroppingQueueHandler, JsonFormatter
from service.metrics import Metrics

NUM_STREAMS = 8
SCRAPE_SECONDS = 5.0
ACCESS = logging.getLogger("qerve.access")


class SilentMetrics(Metrics):
    """Counts nothing that happens."""

    def _ignore(self, *arguments: Any, **options: Any) -> None: ...

    request_started = request_finished = token_generated = step_ran = draft_checked = _ignore
    http_finished = request_accepted = call_finished = rejected = _ignore


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact to serve.")],
    rounds: Annotated[int, typer.Option(help="Rounds of four runs each.")] = 8,
    steps: Annotated[int, typer.Option(help="Tokens of each stream.")] = 96,
) -> None:
    """Print the cost as a share of the rate and of the processor time."""
    loaded = load_artifact(artifact)
    workload = Workload(prompt_len=16, num_steps=steps)
    made: list[Metrics] = []

    def counting(model_name: str, max_model_len: int) -> Metrics:
        made.append(Metrics(model_name, max_model_len))
        return made[-1]

    with ExitStack() as stack:
        stack.enter_context(access_log_to_nowhere())
        silent = stack.enter_context(http_probe(loaded, workload, NUM_STREAMS, SilentMetrics))
        loud = stack.enter_context(http_probe(loaded, workload, NUM_STREAMS, counting))
        gc.collect()
        gc.freeze()  # as the server does when it has loaded
        scrape = stack.enter_context(scraper(lambda: generate_latest(made[0].registry)))
        for probe in (loud, silent):
            probe.run()
        pairs = [pair for _ in range(rounds) for pair in measure_round(loud, silent, scrape)]
    report(pairs)


def measure_round(loud: Probe, silent: Probe, scrape: threading.Event) -> Iterator[tuple[float, float]]:
    """Two ratios of rate and of processor time, with everything to without."""
    runs = [measure(probe, scrape if probe is loud else None) for probe in (loud, silent, silent, loud)]
    for with_it, without in ((runs[0], runs[1]), (runs[3], runs[2])):
        yield with_it[0] / without[0], with_it[1] / without[1]


def measure(probe: Probe, scrape: threading.Event | None) -> tuple[float, float]:
    """Tokens per second at the client's side, and processor seconds of this process."""
    ACCESS.setLevel(logging.ERROR if scrape is None else logging.INFO)
    if scrape is not None:
        scrape.set()
    before = time.process_time()
    (tokens_per_second,) = probe.run()
    seconds = time.process_time() - before
    if scrape is not None:
        scrape.clear()
    return tokens_per_second, seconds


def report(pairs: list[tuple[float, float]]) -> None:
    """Median and quartiles of the costs, in per cent."""
    rates, seconds = ([pair[index] for pair in pairs] for index in (0, 1))
    costs = {"rate": [100 * (1 - ratio) for ratio in rates], "processor time": [100 * (ratio - 1) for ratio in seconds]}
    for name, values in costs.items():
        low, _, high = quantiles(values, n=4)
        print(f"{name}: {median(values):+.2f} % (quartiles {low:+.2f} to {high:+.2f}, {len(values)} pairs)")
    print(json.dumps({"telemetry": {name: median(values) for name, values in costs.items()}, "pairs": len(pairs)}))


@contextmanager
def scraper(read: Callable[[], object]) -> Iterator[threading.Event]:
    """Reads as often as Prometheus would while the event that it yields is set, the first time at once."""
    is_on, is_over = threading.Event(), threading.Event()

    def work() -> None:
        due = 0.0
        while not is_over.wait(0.05):
            if is_on.is_set() and time.monotonic() >= due:
                read()
                due = time.monotonic() + SCRAPE_SECONDS

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield is_on
    finally:
        is_over.set()
        thread.join()


@contextmanager
def access_log_to_nowhere() -> Iterator[None]:
    """Lines are made, handed to their thread, formatted and written, as the server does."""
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    with Path(os.devnull).open("w") as nowhere:
        writer = DescriptorHandler(nowhere.fileno())
        writer.setFormatter(JsonFormatter())
        listener, handler = QueueListener(lines, writer), DroppingQueueHandler(lines)
        ACCESS.addHandler(handler)
        listener.start()
        try:
            yield
        finally:
            ACCESS.removeHandler(handler)
            listener.stop()


if __name__ == "__main__":
    typer.run(main)
