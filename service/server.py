"""Runs an application with uvicorn, and lets what was accepted finish when the process is told to stop."""

import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .deps import Context

logger = logging.getLogger("qerve.server")

CLOSE_SECONDS = 5
"""How long open connections get to close after the last request has ended."""


class DrainingServer(uvicorn.Server):
    """Stops in two stages: finish what was accepted and refuse the rest, then close; a second signal closes at once."""

    def __init__(self, app: FastAPI, log_level: str, on_started: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(app, ws="none", log_level=log_level, timeout_graceful_shutdown=CLOSE_SECONDS)
        super().__init__(config)
        self._on_started = on_started
        self._context: Context = app.state.context
        self._drain_started: float | None = None
        self._is_stop_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived; ``on_tick`` acts on it, on the event loop."""
        if self._is_stop_requested or not self.started:
            super().handle_exit(sig, frame)
            return
        self._is_stop_requested = True
        logger.info("%s: no new requests; those that run may finish", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the main loop."""
        if self._is_stop_requested and not self.should_exit:
            self.should_exit = self._is_drained()
        return await super().on_tick(counter)

    def _is_drained(self) -> bool:
        engine = self._context.engine
        if self._drain_started is None:
            self._drain_started = time.monotonic()
            engine.begin_drain()
        waited = time.monotonic() - self._drain_started
        if engine.is_idle or waited < self._context.settings.drain_timeout_seconds:
            return engine.is_idle
        logger.warning("requests still run after %.0f seconds: they end with an error", waited)
        engine.abandon()
        return True
