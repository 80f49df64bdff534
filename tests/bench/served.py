"""``qerve serve`` as a process of its own, and how its memory grows."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from tools.demo_server import HOST, free_port
from tools.demo_server import Server as ServerProcess

FIRST_PORT = 8100


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
    port = free_port(FIRST_PORT)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    start = [sys.executable, "-c", "from service.cli import main; main()", "serve", str(artifact)]
    command = [*start, "--port", str(port), "--log-level", "warning", *words]
    with TemporaryDirectory() as directory, ServerProcess(command, port, Path(directory) / "server.log") as server:
        server.wait_until_ready()
        yield Server(f"http://{HOST}:{port}", psutil.Process(server.pid))


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
