"""Runs an application with uvicorn, and lets what was accepted finish when the process is told to stop."""

import errno
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from models.errors import QerveError

from .deps import Context

logger = logging.getLogger("qerve.server")

CLOSE_SECONDS = 5
"""How long open connections get to close after the last request has ended."""


def bind(host: str, port: int) -> socket.socket:
    """A socket for ``host`` and ``port`` (0: any that is free), taken before the model is loaded.

    Raises:
        QerveError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only on sockets that say they are TCP; with it, every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise QerveError(f"port {port} on {host} is in use: stop what runs there, or choose --port") from error
        raise QerveError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where the server behind ``listener`` is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Stops in two stages: finish what was accepted and refuse the rest, then close; a second signal closes at once."""

    def __init__(self, app: FastAPI, log_level: str) -> None:
        config = uvicorn.Config(app, ws="none", log_level=log_level, timeout_graceful_shutdown=CLOSE_SECONDS)
        super().__init__(config)
        self._context: Context = app.state.context
        self._drain_started: float | None = None
        self._is_stop_requested = False

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
