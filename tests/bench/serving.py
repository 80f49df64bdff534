"""Load on a real server: streams side by side, Poisson arrivals, a crowd, a soak. Run it with nothing else running.

    python -m tests.bench.serving artifacts/demo --prompts prompts.jsonl
    python -m tests.bench.serving artifacts/demo --prompts prompts.jsonl --only crowd,soak --seconds 300
    python -m tests.bench.serving artifacts/demo --prompts prompts.jsonl --only streams --against http://127.0.0.1:8001

It starts ``qerve serve`` on a free port; ``--against`` measures another server of the same API, which runs already, in
turns with it. Each line of ``--prompts`` is a JSON object with a ``prompt``. Ends with one line of JSON; the exit code
is 1 if any request was lost or failed.
"""

import asyncio
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.bench.load import Outcome, Target, closed_loop, crowd, open_loop
from tests.bench.served import Server, memory_slope, serving

MIB = 1 << 20
ROUNDS = 3
REFUSED = 429


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact to serve.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines, each with a prompt.")],
    only: Annotated[str, typer.Option(help="streams, poisson, crowd, soak")] = "streams,poisson,crowd,soak",
    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams.")] = "1,8,32",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    clients: Annotated[int, typer.Option(help="Clients of the crowd.")] = 1000,
    queue: Annotated[int, typer.Option(help="Sequences that may wait, for the crowd.")] = 64,
    seconds: Annotated[float, typer.Option(help="Length of the soak.")] = 300.0,
    against: Annotated[str | None, typer.Option(help="URL of another server, for the streams.")] = None,
    against_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
) -> None:
    """Measure, print, and fail if a request did."""
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines() if line]
    sections, counts = set(only.split(",")), [int(count) for count in streams.split(",")]
    results: list[dict[str, Any]] = []
    if sections & {"streams", "poisson"}:
        for count in counts:
            with serving(artifact, max_num_seqs=min(count, 64), max_queue=1024) as server:
                target = Target(server.url, None, max_tokens)
                other = None if against is None else Target(against, against_model, max_tokens)
                results += measure_streams(target, other, texts, count, sections)
    if "crowd" in sections:
        with serving(artifact, max_num_seqs=8, max_queue=queue) as server:
            results.append(measure_crowd(Target(server.url, None, 16), texts, clients))
    if "soak" in sections:
        # A cache that is soon full: it becomes resident block by block, which is no leak.
        with serving(artifact, max_num_seqs=8, max_queue=1024, kv_cache_memory="128MiB") as server:
            results.append(measure_soak(server, texts, max_tokens, seconds))
    print(json.dumps({"serving": results}))
    if any(result["failed"] for result in results):
        raise typer.Exit(1)


def measure_streams(
    target: Target, other: Target | None, texts: list[str], num_streams: int, sections: set[str]
) -> list[dict[str, Any]]:
    """``num_streams`` at a time, in rounds with the other server; then arrivals at four fifths of that rate."""
    num_requests = max(8, 3 * num_streams)
    asyncio.run(closed_loop(target, texts[:num_streams], num_streams))  # warm
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for index in range(ROUNDS if other else 1):
        chosen = list(itertools.islice(itertools.cycle(texts), index * num_requests, (index + 1) * num_requests))
        ours.append(timed(f"{num_streams} streams", lambda: closed_loop(target, chosen, num_streams)))  # noqa: B023
        if other is not None:
            theirs.append(timed(f"{num_streams} streams, other", lambda: closed_loop(other, chosen, num_streams)))  # noqa: B023
    results = [*ours, *theirs]
    if "poisson" in sections:
        rate = 0.8 * ours[0]["requests_per_second"]
        chosen = list(itertools.islice(itertools.cycle(texts), num_requests))
        name = f"Poisson arrivals, {rate:.2f} per second ({num_streams} sequences at most)"
        results.append(timed(name, lambda: open_loop(target, chosen, rate)))
    return results


def measure_crowd(target: Target, texts: list[str], num_clients: int) -> dict[str, Any]:
    """All clients at once: each gets its answer, or 429."""
    chosen = list(itertools.islice(itertools.cycle(texts), num_clients))
    return timed(f"{num_clients} clients at once", lambda: crowd(target, chosen), accepted={200, REFUSED})


def measure_soak(server: Server, texts: list[str], max_tokens: int, seconds: float) -> dict[str, Any]:
    """Eight streams for ``seconds``; how the resident memory grows over the second half."""
    target = Target(server.url, None, max_tokens)
    until = time.monotonic() + seconds
    endless = itertools.takewhile(lambda _: time.monotonic() < until, itertools.cycle(texts))
    with memory_slope(server.process) as memory:
        result = timed(f"soak of {seconds:.0f} s, 8 streams", lambda: closed_loop(target, endless, 8))
    result["rss_mib"] = round(memory.last_bytes / MIB, 1)
    result["rss_slope_mib_per_minute"] = round(memory.slope_bytes_per_second() * 60 / MIB, 3)
    print(f"    RSS {result['rss_mib']} MiB, slope over the second half {result['rss_slope_mib_per_minute']} MiB/min")
    return result


def timed(name: str, work: Any, accepted: frozenset[int] | set[int] = frozenset({200})) -> dict[str, Any]:
    """Run ``work``, print a line, and return its figures."""
    started = time.perf_counter()
    outcomes: list[Outcome] = asyncio.run(work())
    seconds = time.perf_counter() - started
    served = [outcome for outcome in outcomes if outcome.is_served]
    statuses = Counter(str(outcome.status) for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.error or outcome.status not in accepted]
    result = {
        "name": name,
        "requests": len(outcomes),
        "statuses": dict(statuses),
        "failed": len(failed),
        "requests_per_second": len(served) / seconds,
        "tokens_per_second": sum(outcome.num_tokens for outcome in served) / seconds,
        "mean_concurrency": sum(outcome.seconds for outcome in outcomes) / seconds,
        **quantiles("ttft", [outcome.token_times[0] for outcome in served if outcome.token_times]),
        **quantiles("inter_token", [gap for outcome in served for gap in outcome.gaps]),
    }
    print(
        f"{name}: {result['tokens_per_second']:.1f} tokens/s, {len(served)} of {len(outcomes)} served, "
        f"{dict(statuses)}, {result['mean_concurrency']:.1f} at a time, "
        f"TTFT {show(result, 'ttft')} ms, between tokens {show(result, 'inter_token')} ms (p50 / p99)"
    )
    for outcome in failed[:3]:
        print(f"    failed: {outcome.status} {outcome.error}")
    return result


def quantiles(name: str, values: list[float]) -> dict[str, float | None]:
    """Median and 99th percentile (nearest rank), in seconds."""
    ranked = sorted(values)

    def pick(share: float) -> float | None:
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None

    return {f"{name}_p50": pick(0.5), f"{name}_p99": pick(0.99)}


def show(result: dict[str, Any], name: str) -> str:
    """The two quantiles of ``name`` in milliseconds."""
    values = [result[f"{name}_{quantile}"] for quantile in ("p50", "p99")]
    return " / ".join("-" if value is None else f"{value * 1000:.1f}" for value in values)


if __name__ == "__main__":
    typer.run(main)
