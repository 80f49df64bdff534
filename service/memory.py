"""What this process, its container and its GPUs hold, read when asked; what a platform lacks is left out."""

from pathlib import Path

import psutil
import torch

_STATUS_KINDS = {"RssAnon": "rss_anon", "RssFile": "rss_file", "RssShmem": "rss_shmem", "VmHWM": "peak"}
_CGROUP_V2 = {"current": "memory.current", "max": "memory.max", "peak": "memory.peak"}
_CGROUP_V1 = {
    "current": "memory.usage_in_bytes",
    "max": "memory.limit_in_bytes",
    "peak": "memory.max_usage_in_bytes",
}
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self")
_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2**63."""


def process_memory(proc: Path = _PROC) -> dict[str, int]:
    """Bytes by kind: rss_anon, rss_file, rss_shmem, peak (largest resident size so far), pss (shared pages divided)."""
    values = {
        kind: size for name, kind in _STATUS_KINDS.items() if (size := _sizes(proc / "status").get(name)) is not None
    }
    pss = _sizes(proc / "smaps_rollup").get("Pss")
    return values if pss is None else {**values, "pss": pss}


def cgroup_memory(root: Path = _CGROUP_ROOT, proc: Path = _PROC) -> dict[str, int]:
    """Bytes by kind: current, max, peak of this process's control group; ``max`` is absent when there is no limit."""
    for directory, names in _cgroups(root, proc):
        values = {kind: size for kind, name in names.items() if (size := _number(directory / name)) is not None}
        if values:
            return {kind: size for kind, size in values.items() if size < _UNLIMITED}
    return {}


def oom_headroom_bytes(root: Path = _CGROUP_ROOT, proc: Path = _PROC) -> int:
    """What can be taken before the machine or the control group is full, page cache that can be dropped included."""
    available: int = psutil.virtual_memory().available
    group = cgroup_memory(root, proc)
    if "max" not in group or "current" not in group:
        return available
    return min(available, max(0, group["max"] - group["current"] + _droppable_bytes(root, proc)))


def cuda_memory() -> dict[tuple[int, str], int]:
    """Bytes by (device index, kind): allocated, reserved, max_allocated, free, total; empty until CUDA is in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    values: dict[tuple[int, str], int] = {}
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        values[device, "allocated"] = torch.cuda.memory_allocated(device)
        values[device, "reserved"] = torch.cuda.memory_reserved(device)
        values[device, "max_allocated"] = torch.cuda.max_memory_allocated(device)
        values[device, "free"] = free
        values[device, "total"] = total
    return values


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device``: on the CPU, within the container's limit too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available: int = psutil.virtual_memory().available
    group = cgroup_memory()
    if "max" in group and "current" in group:
        available = min(available, max(group["max"] - group["current"], 0))
    return available


def _cgroups(root: Path, proc: Path) -> list[tuple[Path, dict[str, str]]]:
    """Where this process's control group may be, the likeliest first: in a container, its own is the root."""
    own: list[tuple[Path, dict[str, str]]] = []
    for _, controllers, path in _cgroup_lines(proc):
        if not controllers:
            own.append((root / path.lstrip("/"), _CGROUP_V2))
        elif "memory" in controllers.split(","):
            own.append((root / "memory" / path.lstrip("/"), _CGROUP_V1))
    return [*own, (root, _CGROUP_V2), (root / "memory", _CGROUP_V1)]


def _cgroup_lines(proc: Path) -> list[list[str]]:
    """Number, controllers and path of each of this process's groups."""
    try:
        lines = (proc / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [fields for line in lines if len(fields := line.split(":", 2)) == 3]


def _droppable_bytes(root: Path, proc: Path) -> int:
    """Pages of files that the group has not used lately: they go before anything is killed."""
    for directory, _ in _cgroups(root, proc):
        try:
            lines = (directory / "memory.stat").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        values = dict(line.split() for line in lines)
        return int(values.get("total_inactive_file") or values.get("inactive_file") or 0)
    return 0


def _sizes(path: Path) -> dict[str, int]:
    """``Name:   123 kB`` lines of ``path`` in bytes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in fields if len(parts) == 3 and parts[2] == "kB"}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
