"""The life of a serving process: take the port, answer, load, serve, drain; its exit status says how it went."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import psutil
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from models.artifact.execution import RunOptions
from models.artifact.load import load_artifact
from models.errors import QerveError
from models.memory import anonymous_bytes, return_freed_memory, share_one_heap

from .app import create_app, key_ring
from .keys import KeyRing
from .listener import bind, url_of
from .loading import LoadingApp
from .logs import logging_to_stderr
from .metrics import Metrics
from .metrics.server import metrics_server
from .server import DrainingServer
from .settings import Settings

logger = logging.getLogger("qerve.server")

_LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))


def serve_settings(settings: Settings) -> None:
    """Serve until the process is told to stop.

    Raises:
        QerveError: the port is taken, the artifact or the keys cannot be used, or the engine has failed.
    """
    share_one_heap()
    try:
        with logging_to_stderr(settings.log_level, settings.log_format):
            keys = key_ring(settings)
            if keys.is_open and settings.host not in _LOOPBACK:
                logger.warning("no API key is set: whoever reaches %s can use this server", settings.host)
            _serve(settings, keys)
    finally:
        if _has_stuck_thread():
            _exit_at_once(sys.exception())


def _serve(settings: Settings, keys: KeyRing) -> None:
    registry = CollectorRegistry()
    with bind(settings.host, settings.port) as listener, _metrics_port(settings, registry) as metrics_url:

        def announce() -> None:
            context = loading.state.context
            context.metrics.rejected("loading", loading.num_rejected)
            metrics_are = "" if metrics_url is None else f", metrics on {metrics_url}"
            _say(f"Serving {context.info.name} on {url_of(listener)}{metrics_are} (Ctrl-C stops it)")

        def give_up() -> None:
            server.should_exit = True

        loading = LoadingApp(_loader(settings, keys, registry), announce, give_up)
        server = DrainingServer(loading, settings.log_level)
        if settings.api_keys_file is not None:
            signal.signal(signal.SIGHUP, server.handle_reload)
        server.run(sockets=[listener])
    if loading.error is not None:
        raise loading.error
    if server.failure is not None:
        raise QerveError(f"the server has stopped: {server.failure}; the log says why")


def _metrics_port(settings: Settings, registry: CollectorRegistry) -> contextlib.AbstractContextManager[str | None]:
    if settings.metrics_port is None:
        return contextlib.nullcontext()
    return metrics_server(settings.metrics_host or settings.host, settings.metrics_port, registry)


def _loader(settings: Settings, keys: KeyRing, registry: CollectorRegistry) -> Callable[[], FastAPI]:
    imports_seconds = time.time() - psutil.Process().create_time()

    def load() -> FastAPI:
        assert settings.artifact is not None  # noqa: S101 checked where the command line is read
        choices = RunOptions(settings.backend, settings.activations, settings.kv_cache_dtype)
        return_freed_memory()
        interpreter_bytes = anonymous_bytes()
        loaded = load_artifact(settings.artifact, settings.torch_device, settings.torch_dtype, options=choices)
        new_metrics = partial(Metrics, registry=registry)
        app = create_app(loaded, settings, keys, new_metrics=new_metrics, interpreter_bytes=interpreter_bytes)
        app.state.context.metrics.phases["imports"] = imports_seconds
        return_freed_memory()
        # What is loaded stays: the collector need not go through it again and again while requests wait.
        gc.collect()
        gc.freeze()
        return app

    return load


def _say(message: str) -> None:
    """On standard output, as far as there is one: nobody's request depends on it."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{message}\n".encode())


def _has_stuck_thread() -> bool:
    """A thread of ours is in the middle of something that cannot be interrupted: loading, or a step that hangs."""
    return any(thread.name in {"qerve-load", "qerve-engine"} for thread in threading.enumerate())


def _exit_at_once(error: BaseException | None) -> NoReturn:
    """End the process without the interpreter's clean-up, which native code in other threads does not survive."""
    if error is not None:
        with contextlib.suppress(OSError):
            os.write(2, f"error: {error}\n".encode())
    os._exit(0 if error is None else 1)
