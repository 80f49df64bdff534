"""Server-sent events: one JSON object per event, comments while nothing happens, ``[DONE]`` at the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

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


class StreamEnd(Enum):
    """How a stream ended."""

    COMPLETE = "complete"
    DISCONNECTED = "disconnected"
    STALLED = "stalled"


class EventStream(StreamingResponse):
    """Sends ``events``; at its end, whatever the end, calls ``close`` with it.

    write_timeout_seconds: how long the reader may take nothing, with the connection's buffers full
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[StreamEnd], None],
        heartbeat_seconds: float,
        write_timeout_seconds: float,
    ) -> None:
        # Proxies must pass events on as they come.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(with_heartbeats(events, heartbeat_seconds), headers=headers)
        self._close = close
        self._write_timeout_seconds = write_timeout_seconds
        self._sending_since: float | None = None
        self._end = StreamEnd.DISCONNECTED

    async def stream_response(self, send: Send) -> None:
        """Send everything."""
        async with asyncio.timeout(None) as limit:
            # One timer for all events: a timeout of its own for each costs more than sending it.
            watch = asyncio.create_task(self._watch(limit))
            try:
                await super().stream_response(self._timed(send))
            finally:
                watch.cancel()
        self._end = StreamEnd.COMPLETE

    def _timed(self, send: Send) -> Send:
        clock = asyncio.get_running_loop().time

        async def send_and_note(message: Message) -> None:
            self._sending_since = clock()
            await send(message)
            self._sending_since = None

        return send_and_note

    async def _watch(self, limit: asyncio.Timeout) -> None:
        """Let ``limit`` pass when something has waited for the reader too long."""
        clock = asyncio.get_running_loop().time
        while self._sending_since is None or clock() - self._sending_since < self._write_timeout_seconds:
            await asyncio.sleep(self._write_timeout_seconds / 4)
        self._end = StreamEnd.STALLED
        limit.reschedule(clock())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, or as much of it as the client stays for."""
        try:
            with contextlib.suppress(ClientDisconnect, TimeoutError):
                await super().__call__(scope, receive, send)
        finally:
            self._close(self._end)
