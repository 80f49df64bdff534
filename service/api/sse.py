"""Server-sent events: one JSON object per event, comments while nothing happens, ``[DONE]`` at the end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"


def encode_event(values: dict[str, Any]) -> bytes:
    """One event. JSON escapes line ends, so it is a single ``data`` line."""
    return b"data: " + to_json(values, inf_nan_mode="null") + b"\n\n"


class StreamEnd(Enum):
    """How a stream ended."""

    COMPLETE = "complete"
    DISCONNECTED = "disconnected"
    STALLED = "stalled"


class EventStream(StreamingResponse):
    """Sends ``events``, and a comment whenever none comes for a while; at its end, whatever the end, calls ``close``.

    heartbeat_seconds:     silence after which the comment is sent
    write_timeout_seconds: how long the reader may take nothing, with the connection's buffers full
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[StreamEnd], None],
        heartbeat_seconds: float,
        write_timeout_seconds: float,
    ) -> None:
        # Proxies must pass events on as they come.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._close = close
        self._heartbeat_seconds = heartbeat_seconds
        self._write_timeout_seconds = write_timeout_seconds
        self._turn = asyncio.Lock()
        self._sending_since: float | None = None
        self._last_sent = 0.0
        self._end = StreamEnd.DISCONNECTED

    async def stream_response(self, send: Send) -> None:
        """Send everything."""
        send = self._timed(send)
        async with asyncio.timeout(None) as limit:
            # Timers for the whole stream: one for each event would cost more than sending it.
            watches = [asyncio.create_task(self._limit_writes(limit)), asyncio.create_task(self._send_heartbeats(send))]
            try:
                await super().stream_response(send)
            finally:
                for watch in watches:
                    watch.cancel()
        self._end = StreamEnd.COMPLETE

    def _timed(self, send: Send) -> Send:
        clock = asyncio.get_running_loop().time

        async def send_in_turn(message: Message) -> None:
            async with self._turn:
                self._sending_since = clock()
                await send(message)
                self._sending_since, self._last_sent = None, clock()

        return send_in_turn

    async def _send_heartbeats(self, send: Send) -> None:
        """Break every silence, from the first event's on."""
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            silence = clock() - self._last_sent
            if silence < self._heartbeat_seconds or self._turn.locked():
                await asyncio.sleep(max(self._heartbeat_seconds - silence, self._heartbeat_seconds / 4))
            else:
                await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})

    async def _limit_writes(self, limit: asyncio.Timeout) -> None:
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
