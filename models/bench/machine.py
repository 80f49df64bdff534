"""The machine that is measured, and whether anything else runs on it."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import QerveError

MAX_LOAD = 0.3
"""Load average above which measurements say more about the other processes."""
_BUSY = ("user", "nice", "system", "irq", "softirq")


def check_quiet(load: float, *, allow_noise: bool) -> None:
    """Refuse to measure on a machine that works for others.

    Raises:
        QerveError: ``load``, the load average of the last minute, is above ``MAX_LOAD``.
    """
    if load > MAX_LOAD and not allow_noise:
        raise QerveError(
            f"the load average is {load:.2f}: other processes run, so that speeds would not be those of this machine; "
            f"wait until it is below {MAX_LOAD}, or measure all the same with --allow-noise"
        )


def load_average() -> float:
    """Of the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def processor_name(root: Path = Path("/")) -> str:
    """The processor as the system calls it."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(_field(line) for line in text.splitlines() if ":" in line)
    return fields.get("model name") or platform.processor() or platform.machine()


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


@dataclass(frozen=True, slots=True)
class Noise:
    """Processors' worth of time that went elsewhere while measurements ran.

    others: to other processes
    stolen: to other machines on the same host
    """

    others: float
    stolen: float


class NoiseMeter:
    """Counts what other processes use from its making on; this process and its children are no noise."""

    def __init__(self) -> None:
        self._start = _times()

    def read(self) -> Noise:
        """Noise so far."""
        wall, busy, own, stolen = (now - then for now, then in zip(_times(), self._start, strict=True))
        wall = max(wall, 1e-9)
        return Noise(max(0.0, busy - own) / wall, stolen / wall)


def _times() -> tuple[float, float, float, float]:
    """Seconds: of the clock, of all processors in use, of this process and its children, stolen."""
    system = psutil.cpu_times()
    process = psutil.Process()
    own = sum(process.cpu_times()[:4])
    for child in process.children(recursive=True):
        try:
            own += sum(child.cpu_times()[:2])
        except psutil.Error:  # it has ended meanwhile
            continue
    busy = sum(getattr(system, name, 0.0) for name in _BUSY)
    return time.monotonic(), busy, own, getattr(system, "steal", 0.0)
