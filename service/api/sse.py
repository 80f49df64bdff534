"""Server-sent events: one JSON object per event, comments while nothing happens, ``[DONE]`` at the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"
HEARTBEAT = ": waiting\n\n"


def encode_event(values: dict[str, Any]) -> str:
    """One event. JSON escapes line ends, so it is a single ``data`` line."""
    return f"data: {json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


async def with_heartbeats(events: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """``events``, and a comment whenever none comes for ``seconds``."""
    pending: asyncio.Future[str] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events, ""))
            done, _ = await asyncio.wait((pending,), timeout=seconds)
            if not done:
                yield HEARTBEAT
                continue
            event, pending = pending.result(), None
            if not event:
                return
            yield event
    finally:
        if pending is not None:
            pending.cancel()


class EventStream(StreamingResponse):
    """Sends ``events``; at its end, whatever the end, calls ``close`` with whether all of them were sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[bool], None], heartbeat_seconds: float) -> None:
        # Proxies must pass events on as they come.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(with_heartbeats(events, heartbeat_seconds), headers=headers)
        self._close = close
        self._is_complete = False

    async def stream_response(self, send: Send) -> None:
        """Send everything."""
        await super().stream_response(send)
        self._is_complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, or as much of it as the client stays for."""
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._close(self._is_complete)
