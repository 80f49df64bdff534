"""Two replicas on a local Ray cluster, one of which is killed under load. Run it with nothing else running.

    python -m tests.bench.replicas artifacts/demo --prompts prompts.jsonl

Clients ask again and again, each for the next prompt as soon as it has its answer; a third of the way through, one
replica's process gets SIGKILL. Ends with one line of JSON: what became of every request, tokens per second before the
kill, while one replica was left, and after the new one had come. The exit code is 1 if a request got neither an answer
nor an error, or one failed that the dead replica did not have.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import typer
from ray import serve

from service.replicas import DEPLOYMENT, ReplicaOptions, app
from tests.bench.load import Outcome, Target, ask, session

APPLICATION = "qerve"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Timed:
    """One request: when it began and ended, in seconds from the start of the load."""

    began: float
    ended: float
    outcome: Outcome


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact to serve.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines, each with a prompt.")],
    replicas: Annotated[int, typer.Option(help="Replicas.")] = 2,
    clients: Annotated[int, typer.Option(help="Clients at the same time.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of the load.")] = 90.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    port: Annotated[int, typer.Option(help="Of Ray's proxy.")] = 8321,
) -> None:
    """Measure, print, and fail if a request was lost."""
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines() if line]
    ray.init(num_cpus=replicas + 1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = ReplicaOptions(artifact=artifact.resolve(), num_replicas=replicas)
        serve.run(app(options), name=APPLICATION, route_prefix="/")
        target = Target(f"http://127.0.0.1:{port}", None, max_tokens)
        result = asyncio.run(_measure(target, texts, clients, seconds, replicas))
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps({"replicas": result}))
    if result["lost"] or result["failed_elsewhere"]:
        raise typer.Exit(1)


async def _measure(target: Target, texts: list[str], clients: int, seconds: float, replicas: int) -> dict[str, Any]:
    waiting, done = cycle(texts), list[Timed]()
    started = time.perf_counter()

    async def client(connection: Any) -> None:
        while (began := time.perf_counter() - started) < seconds:
            outcome = await ask(connection, target, next(waiting))
            done.append(Timed(began, time.perf_counter() - started, outcome))

    async with session() as connection:
        load = [asyncio.create_task(client(connection)) for _ in range(clients)]
        await asyncio.sleep(seconds / 3)
        victim = _replica_processes()[0]
        killed = time.perf_counter() - started
        victim.kill()
        recovered = await _until_recovered(victim.pid, replicas, started)
        await asyncio.gather(*load)
    return summary(done, killed, recovered, seconds)


def _replica_processes() -> list[psutil.Process]:
    """Processes that run a replica: Ray names them after it."""
    found = [it for it in psutil.process_iter(["cmdline"]) if f"ServeReplica:{APPLICATION}:{DEPLOYMENT}" in _title(it)]
    return sorted(found, key=lambda process: process.pid)


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


async def _until_recovered(victim: int, replicas: int, started: float) -> float:
    """When Ray counted as many running replicas as before, without the one killed."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
        alive = [process.pid for process in _replica_processes()]
        if victim not in alive and len(alive) >= replicas and states.get("RUNNING", 0) >= replicas:
            return time.perf_counter() - started


def summary(done: list[Timed], killed: float, recovered: float, seconds: float) -> dict[str, Any]:
    """Requests by what became of them, and tokens per second by phase."""
    broken = [it for it in done if not it.outcome.is_served]
    in_flight = [it for it in broken if it.began <= killed + 1.0 and it.ended >= killed]
    phases = {"before": (0.0, killed), "one_left": (killed, recovered), "after": (recovered, seconds)}
    return {
        "requests": len(done),
        "served": len(done) - len(broken),
        "failed_with_the_replica": len(in_flight),
        "failed_elsewhere": len(broken) - len(in_flight),
        "lost": sum(it.outcome.status is None and it.outcome.error is None for it in done),
        "errors": Counter(f"{it.outcome.status}: {(it.outcome.error or '')[:80]}" for it in broken),
        "seconds_until_recovered": round(recovered - killed, 1),
        "tokens_per_second": {name: _rate(done, *between) for name, between in phases.items()},
    }


def _rate(done: list[Timed], first: float, last: float) -> float:
    times = [it.began + at for it in done for at in it.outcome.token_times]
    return round(sum(first <= at < last for at in times) / max(last - first, 1e-9), 1)


if __name__ == "__main__":
    typer.run(main)
