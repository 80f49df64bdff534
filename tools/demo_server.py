"""The demo's server process: started, watched and stopped, with its log kept for when it fails."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .demo_client import Client, DemoError

HOST = "127.0.0.1"
NUM_PORTS_TRIED = 50
NUM_LOG_LINES = 20
POLL_SECONDS = 0.05
START_SECONDS = 120.0
STOP_SECONDS = 20.0
# The demo's own requests carry no key, and it serves only this machine.
UNWANTED_SETTINGS = frozenset({"QERVE_API_KEY"})
# A server that ends by re-raising the signal it was stopped with has still ended cleanly.
CLEAN_EXITS = frozenset({0, -signal.SIGTERM, 128 + signal.SIGTERM})


def free_port(wanted: int) -> int:
    """``wanted``, or the next port above it that nothing listens on."""
    for port in range(wanted, min(wanted + NUM_PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise DemoError(f"no free port from {wanted} up; choose another with PORT=N")


class Server:
    """A context manager around one server process; leaving it always ends the process.

    The process gets a session of its own: Ctrl-C reaches only the demo, which then stops it in order.
    """

    def __init__(self, command: Sequence[str], port: int, log_path: Path) -> None:
        self.client = Client(HOST, port)
        self._command = list(command)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in UNWANTED_SETTINGS}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = self._stop()
        if kind is None and code not in CLEAN_EXITS:
            raise DemoError(f"the server did not end cleanly (exit status {code}):\n{self.log_tail()}")

    def wait_until_ready(self) -> float:
        """Seconds from the start of the process until its readiness probe succeeds."""
        started = time.perf_counter()
        while not self.client.is_ready():
            self._check_alive()
            if time.perf_counter() - started > START_SECONDS:
                raise DemoError(f"the server was not ready after {START_SECONDS:.0f} s:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)
        self._check_alive()
        return time.perf_counter() - started

    @property
    def pid(self) -> int:
        """The process."""
        return self._running().pid

    def wait(self) -> None:
        """Return never: either the caller is interrupted, or the server ended by itself, which is an error."""
        while True:
            self._check_alive()
            time.sleep(0.5)

    def log_tail(self) -> str:
        """Last lines the server printed."""
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-NUM_LOG_LINES:]) or "(it printed nothing)"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DemoError("the server was not started")
        return self._process

    def _check_alive(self) -> None:
        if (code := self._running().poll()) is not None:
            raise DemoError(f"the server ended by itself (exit status {code}); its last lines:\n{self.log_tail()}")

    def _stop(self) -> int:
        process = self._running()
        if process.poll() is None:
            process.terminate()
        try:
            return process.wait(STOP_SECONDS)
        except BaseException:  # too slow, or a second Ctrl-C: never leave it running
            process.kill()
            return process.wait()
