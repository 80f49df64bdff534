"""Runs an application with uvicorn, and lets what was accepted finish when the process is told to stop."""

import logging
import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from models.errors import QerveError
from models.memory import return_freed_memory

from .deps import Context
from .loading import LoadingApp

logger = logging.getLogger("qerve.server")

CLOSE_SECONDS = 5
"""How long open connections get to close after the last request has ended."""
TICKS_BETWEEN_TRIMS = 300
"""Half a minute: what requests have freed goes back to the system, or the heap's gaps grow for hours."""


class DrainingServer(uvicorn.Server):
    """Stops in two stages: finish what was accepted and refuse the rest, then close; a second signal closes at once.

    failure: why it stopped by itself: the engine has ended
    """

    def __init__(self, app: FastAPI | LoadingApp, log_level: str) -> None:
        config = uvicorn.Config(
            app,
            ws="none",
            log_level=log_level,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self.failure: str | None = None
        self._app = app
        self._drain_started: float | None = None
        self._stop_signal: int | None = None
        self._is_reload_requested = False

    @property
    def _context(self) -> Context | None:
        """None while the model is being loaded."""
        context: Context | None = getattr(self._app.state, "context", None)
        return context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived; ``on_tick`` acts on it, on the event loop."""
        if self._stop_signal is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._stop_signal = sig

    def handle_reload(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks to read the API keys again; ``on_tick`` does it."""
        self._is_reload_requested = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the main loop."""
        if counter % TICKS_BETWEEN_TRIMS == TICKS_BETWEEN_TRIMS - 1:
            return_freed_memory()
        context = self._context
        if self._is_reload_requested and context is not None:
            self._is_reload_requested = False
            _reload_keys(context)
        if self.failure is None and context is not None:
            self.failure = context.engine.failure
            if self.failure is not None:
                logger.critical("the server stops: %s", self.failure)
                context.engine.end_calls("the engine failed")
                self.should_exit = True
        if self._stop_signal is not None and not self.should_exit:
            self.should_exit = context is None or self._is_drained(context, self._stop_signal)
        return await super().on_tick(counter)

    def _is_drained(self, context: Context, stop_signal: int) -> bool:
        engine = context.engine
        if self._drain_started is None:
            self._drain_started = time.monotonic()
            logger.info("%s: no new requests; those that run may finish", signal.Signals(stop_signal).name)
            engine.begin_drain()
        waited = time.monotonic() - self._drain_started
        if engine.is_idle or waited < context.settings.drain_timeout_seconds:
            return engine.is_idle
        logger.warning("requests still run after %.0f seconds: they end with an error", waited)
        engine.abandon()
        return True


def _reload_keys(context: Context) -> None:
    try:
        context.keys.reload()
    except QerveError as error:
        logger.error("the API keys stay as they were: %s", error)
    else:
        logger.info("%d API keys are valid now", len(context.keys))
