"""The clients of a fault run: those who behave and those who do not, each kind counted by what became of it."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

WORDS = tuple("the cat sat on a mat while rain fell over hills and nobody said what time it was".split(" "))  # noqa: SIM905
RAMP = 0.65
"""The last client of a flood begins after this share of the phase."""


@dataclass
class Clients:
    """What the clients of a run know of the server, and what they saw: (kind, outcome) -> number."""

    url: str
    model: str
    session: aiohttp.ClientSession
    words: random.Random = field(default_factory=lambda: random.Random(0))
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def body(self, num_words: int, max_tokens: int) -> dict[str, Any]:
        """A completion with a prompt that no other has."""
        prompt = " ".join(self.words.choices(WORDS, k=num_words))
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> str:
        """The status of the answer."""
        async with self.session.post(f"{self.url}{path}", json=body, headers=headers) as response:
            await response.read()
            return str(response.status)

    async def complete(self) -> str:
        """A short completion."""
        return await self.post("/v1/completions", self.body(20, 12))

    async def score(self) -> str:
        """The perplexity of a text, with pauses in between."""
        status = await self.post("/v1/perplexity", {"model": self.model, "text": self.body(40, 1)["prompt"]})
        await asyncio.sleep(1.0)
        return status

    async def leave(self) -> str:
        """A stream whose reader is gone after the first tokens."""
        body = {**self.body(10, 200), "stream": True}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    break
            response.close()
        return "left"

    async def oversize(self) -> str:
        """A prompt longer than the context."""
        status = await self.post("/v1/completions", self.body(2000, 8))
        await asyncio.sleep(0.3)
        return status

    async def deadline(self) -> str:
        """A long answer in no time."""
        status = await self.post("/v1/completions", self.body(10, 200), **{"X-Request-Timeout": "0.5"})
        await asyncio.sleep(0.3)
        return status

    async def flood(self) -> str:
        """A completion, again at once; who is refused waits for a moment only."""
        status = await self.post("/v1/completions", self.body(20, 32))
        await asyncio.sleep(0.25 if status == "429" else 0.0)
        return status

    async def repeat(self, kind: str, delay: float, end: float) -> None:
        """``kind`` again and again until ``end`` (``time.monotonic``)."""
        act: Callable[[], Awaitable[str]] = getattr(self, kind)
        await asyncio.sleep(delay)
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0.1) + 60):
                    outcome = await act()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                outcome = type(error).__name__
                await asyncio.sleep(0.5)
            self.seen[kind, outcome] += 1

    async def run(self, load: dict[str, int], seconds: float) -> None:
        """All clients of ``load`` for ``seconds``; a flood's begin one after the other."""
        end = time.monotonic() + seconds
        tasks = [
            self.repeat(kind, RAMP * seconds * index / number if kind == "flood" else 0.05 * index, end)
            for kind, number in load.items()
            for index in range(number)
        ]
        await asyncio.gather(*tasks)
