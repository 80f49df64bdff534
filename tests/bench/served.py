"""``qerve serve`` as a process of its own, and how its memory grows."""

import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from service.listener import bind

PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    process: psutil.Process


@dataclass(slots=True)
class Memory:
    """Resident bytes over time."""

    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def last_bytes(self) -> int:
        """The newest value."""
        return self.sizes[-1]

    def slope_bytes_per_second(self) -> float:
        """Of the straight line through the second half."""
        half = len(self.times) // 2
        return float(np.polyfit(self.times[half:], self.sizes[half:], 1)[0])


@contextmanager
def serving(artifact: Path, **options: object) -> Iterator[Server]:
    """Serve ``artifact`` until the context ends; ``options`` as on the command line."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    start = [sys.executable, "-c", "from service.cli import main; main()", "serve", str(artifact)]
    process = subprocess.Popen([*start, "--port", str(port), "--log-level", "warning", *words])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process)
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.1)


@contextmanager
def memory_slope(process: psutil.Process) -> Iterator[Memory]:
    """Reads the resident size once a second while the context lasts."""
    memory, is_over = Memory(), threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            memory.times.append(time.monotonic())
            memory.sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()
