"""A client that loads a completions server and notes when every token came."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATIENCE_SECONDS = 600.0


@dataclass(slots=True)
class Outcome:
    """What became of one request; times in seconds from the moment it was sent.

    status:      of the HTTP answer; None: no answer, or one that was cut off, and ``error`` says how
    token_times: of every event that carried text
    """

    status: int | None = None
    error: str | None = None
    num_tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_served(self) -> bool:
        """The whole answer came."""
        return self.status == 200 and self.error is None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one text and the next."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Target:
    """A server and what to ask of it."""

    url: str
    model: str | None
    max_tokens: int

    def body(self, prompt: str) -> dict[str, Any]:
        """A streamed completion that always has ``max_tokens`` tokens."""
        named = {} if self.model is None else {"model": self.model}
        fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        return {"prompt": prompt, "max_tokens": self.max_tokens, **named, **fixed}


def session() -> aiohttp.ClientSession:
    """Connections without a limit on their number."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout)


async def ask(client: aiohttp.ClientSession, target: Target, prompt: str) -> Outcome:
    """Stream one completion."""
    outcome, started = Outcome(), time.perf_counter()
    try:
        async with client.post(f"{target.url}/v1/completions", json=target.body(prompt)) as response:
            outcome.status = response.status
            if response.status == 200:
                await _read(response, outcome, started)
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - started
    return outcome


async def _read(response: aiohttp.ClientResponse, outcome: Outcome, started: float) -> None:
    is_complete = False
    async for line in response.content:
        if line.startswith(b"data: [DONE]"):
            is_complete = True
        elif line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            if any(choice["text"] for choice in event["choices"]):
                outcome.token_times.append(time.perf_counter() - started)
            if event.get("usage"):
                outcome.num_tokens = event["usage"]["completion_tokens"]
    if not is_complete:
        raise ValueError("the stream was cut off")


async def closed_loop(target: Target, prompts: Iterable[str], num_streams: int) -> list[Outcome]:
    """``num_streams`` clients, each of which asks for the next of ``prompts`` as soon as it has its answer."""
    waiting = iter(prompts)
    outcomes: list[Outcome] = []

    async def work(client: aiohttp.ClientSession) -> None:
        for prompt in waiting:
            outcome = await ask(client, target, prompt)
            outcomes.append(outcome)

    async with session() as client:
        await asyncio.gather(*(work(client) for _ in range(num_streams)))
    return outcomes


async def _arrivals(prompts: Iterable[str], rate: float, seed: int) -> AsyncIterator[str]:
    """``prompts`` as a Poisson process of ``rate`` per second, late ones at once."""
    generator, due = random.Random(seed), time.perf_counter()
    for prompt in prompts:
        due += generator.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield prompt


async def open_loop(target: Target, prompts: Iterable[str], rate: float, seed: int = 0) -> list[Outcome]:
    """Requests that arrive at ``rate`` per second whether or not earlier ones have been answered."""
    async with session() as client:
        tasks = [asyncio.create_task(ask(client, target, prompt)) async for prompt in _arrivals(prompts, rate, seed)]
        return await asyncio.gather(*tasks)


async def crowd(target: Target, prompts: Sequence[str]) -> list[Outcome]:
    """All of ``prompts`` at once, one client each."""
    async with session() as client:
        return await asyncio.gather(*(ask(client, target, prompt) for prompt in prompts))
