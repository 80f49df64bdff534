"""How many threads the native kernels get: one per physical core that this process may really use.

Two threads of one core share its arithmetic units, so a second one adds nothing. More threads than the container's
quota of processor time are stopped in the middle of a step, and the others wait for them at the next barrier; hence a
quota is rounded down. Everything is read from files below a root folder, as Linux shows them.
"""

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """A number of threads, and what it follows from, in words for the user."""

    num_threads: int
    reason: str


def choose_num_threads(requested: int | None, root: Path = ROOT) -> ThreadChoice:
    """``requested`` threads, or as many as this process has physical cores and processor time for, at least one."""
    if requested is not None:
        return ThreadChoice(requested, "QERVE_NUM_THREADS")
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        return limit_threads(len(cpus), num_physical_cores(cpus, root), cgroup_quota(root))
    return limit_threads(os.cpu_count() or 1, psutil.cpu_count(logical=False) or 1, None)


def limit_threads(num_cpus: int, num_cores: int, quota: float | None) -> ThreadChoice:
    """The smaller of ``num_cores`` (behind ``num_cpus`` usable processors) and the whole part of ``quota``."""
    if quota is not None and quota < num_cores:
        return ThreadChoice(max(1, math.floor(quota)), f"the control group's quota of {quota:g} processors")
    return ThreadChoice(max(1, num_cores), f"{num_cores} physical cores behind {num_cpus} usable processors")


def num_physical_cores(cpus: Collection[int], root: Path = ROOT) -> int:
    """Physical cores behind the processors ``cpus``; one whose siblings are not told counts as a core."""
    cores = set()
    for cpu in cpus:
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(parse_cpu_list(text) | {cpu} if text else frozenset({cpu}))
    return len(cores)


def parse_cpu_list(text: str) -> frozenset[int]:
    """``"0-2,8"`` -> {0, 1, 2, 8}: the kernel's way to write processors."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cgroup_quota(root: Path = ROOT) -> float | None:
    """Processors that the control groups of this process grant it time for, None: as many as there are.

    The tightest of all levels counts, in version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``). Inside a
    container the path in ``/proc/self/cgroup`` may be the host's: levels that are not there are passed over.
    """
    mount = root / "sys/fs/cgroup"
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            quotas += [_quota_v2(level) for level in _levels(mount, path)]
        elif "cpu" in controllers.split(","):
            for folder in dict.fromkeys((controllers, "cpu")):
                quotas += [_quota_v1(level) for level in _levels(mount / folder, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _levels(mount: Path, path: str) -> Iterator[Path]:
    """Folders of the group ``path`` and of every group around it."""
    group = PurePosixPath(path.lstrip("/"))
    yield from (mount / level for level in (group, *group.parents) if ".." not in level.parts)


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Quota over period, both in microseconds; None for no limit ("max", -1) and for files that are not there."""
    quota, period = quota.strip(), period.strip()
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
