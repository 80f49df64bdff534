"""The number of threads follows the processor's topology and the container's quota, read from files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import KernelError
from models.kernels.native.environment import NativeEnvironment
from models.kernels.native.threads import (
    ThreadChoice,
    cgroup_quota,
    choose_num_threads,
    limit_threads,
    num_physical_cores,
    parse_cpu_list,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def siblings(cpu: int) -> str:
    return f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"


@given(st.sets(st.integers(0, 300)))
def test_cpu_list_is_read_however_it_is_grouped(cpus: set[int]) -> None:
    assert parse_cpu_list(",".join(map(str, sorted(cpus))) + "\n") == cpus


def test_cpu_list_of_ranges() -> None:
    assert parse_cpu_list("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}


def test_hyperthreads_of_one_core_count_once(tmp_path: Path) -> None:
    pairs = {siblings(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}
    write(tmp_path, pairs)
    assert num_physical_cores(range(8), tmp_path) == 4
    assert num_physical_cores({0, 4}, tmp_path) == 1
    assert num_physical_cores({0, 1, 4}, tmp_path) == 2


def test_processors_without_topology_are_cores(tmp_path: Path) -> None:
    assert num_physical_cores({0, 1, 5}, tmp_path) == 3


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 4.0),
        # an outer group is tighter than the own one
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 25000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2.0,
        ),
        # the host's path, which the container does not see
        ({"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        # a process moved out of its namespace's root
        ({"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/host/path\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({}, None),
    ],
)
def test_quota_is_that_of_the_tightest_group(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cgroup_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("num_cores", "quota", "num_threads"),
    [(8, None, 8), (8, 4.0, 4), (8, 3.9, 3), (8, 0.5, 1), (2, 16.0, 2), (2, 2.0, 2), (0, None, 1)],
)
def test_threads_are_cores_within_the_quota_and_at_least_one(
    num_cores: int, quota: float | None, num_threads: int
) -> None:
    assert limit_threads(16, num_cores, quota).num_threads == num_threads


def test_reason_names_what_limits() -> None:
    assert "quota of 1.5" in limit_threads(16, 8, 1.5).reason
    assert "8 physical cores" in limit_threads(16, 8, None).reason


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processor masks are Linux's")
def test_choice_joins_mask_topology_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    files = {siblings(cpu): f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}\n" for cpu in range(6)}
    assert choose_num_threads(None, write(tmp_path, files)).num_threads == 3
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert choose_num_threads(None, tmp_path).num_threads == 2
    assert choose_num_threads(5, tmp_path) == ThreadChoice(5, "QERVE_NUM_THREADS")


def test_this_machine_has_threads_no_more_than_processors() -> None:
    assert 1 <= choose_num_threads(None).num_threads <= (os.cpu_count() or 1)


# --- the environment -------------------------------------------------------------------------------------------------


def test_environment_is_read_and_empty_means_unset() -> None:
    variables = {"QERVE_CPU_LIBRARY": "/a/b.so", "QERVE_CPU_ISA": "avx2", "QERVE_NUM_THREADS": "12", "OTHER": "1"}
    assert NativeEnvironment.read(variables) == NativeEnvironment(Path("/a/b.so"), "avx2", 12)
    assert NativeEnvironment.read(dict.fromkeys(variables, "")) == NativeEnvironment()
    assert NativeEnvironment.read({}) == NativeEnvironment(None, None, None)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "9" * 30, "²", " 2"])
def test_number_of_threads_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(KernelError, match="QERVE_NUM_THREADS"):
        NativeEnvironment.read({"QERVE_NUM_THREADS": text})
