"""What the server does between requests."""

from fastapi import FastAPI

from service import server
from service.server import TICKS_BETWEEN_TRIMS, DrainingServer


async def test_freed_memory_goes_back_to_the_system_every_half_minute(monkeypatch) -> None:
    times: list[int] = []
    ticking = DrainingServer(FastAPI(), log_level="warning")
    for counter in range(3 * TICKS_BETWEEN_TRIMS):
        monkeypatch.setattr(server, "return_freed_memory", lambda at=counter: times.append(at))
        await ticking.on_tick(counter)
    assert times == [TICKS_BETWEEN_TRIMS - 1, 2 * TICKS_BETWEEN_TRIMS - 1, 3 * TICKS_BETWEEN_TRIMS - 1]
