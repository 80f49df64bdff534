"""Memory readings from files as the kernel writes them, and from platforms that have none."""

import os
import sys

import psutil
import pytest
import torch

from models.memory import resident_tensor_bytes
from service.memory import available_bytes, cgroup_memory, cuda_memory, oom_headroom_bytes, process_memory

STATUS = (
    "Name:\tpython\nVmHWM:\t  4000 kB\nVmRSS:\t 3000 kB\nRssAnon:\t 2000 kB\nRssFile:\t 900 kB\nRssShmem:\t 100 kB\n"
)
SMAPS = "7f00-7fff ---p 00000000 00:00 0   [rollup]\nRss:   3000 kB\nPss:   2500 kB\n"


def write(directory, **files):
    for name, text in files.items():
        path = directory / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_process_memory_by_kind(tmp_path):
    proc = write(tmp_path, status=STATUS, smaps_rollup=SMAPS)
    kib = {"rss_anon": 2000, "rss_file": 900, "rss_shmem": 100, "peak": 4000, "pss": 2500}
    assert process_memory(proc) == {kind: size * 1024 for kind, size in kib.items()}


def test_what_the_system_does_not_offer_is_left_out(tmp_path):
    assert process_memory(tmp_path) == {}
    assert cgroup_memory(tmp_path, tmp_path) == {}
    assert process_memory(write(tmp_path, status="VmHWM: 1 kB\n")) == {"peak": 1024}


def test_the_own_control_group_is_found_through_proc(tmp_path):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(root / "a" / "b", memory__current="10\n", memory__max="100\n", memory__peak="50\n")
    write(root, memory__current="999\n")
    write(proc, cgroup="0::/a/b\n")
    assert cgroup_memory(root, proc) == {"current": 10, "max": 100, "peak": 50}


def test_in_a_container_the_control_group_is_the_root_one(tmp_path):
    root, proc = write(tmp_path / "cgroup", memory__current="10\n", memory__max="max\n"), tmp_path / "proc"
    write(proc, cgroup="0::/not/visible/here\n")
    assert cgroup_memory(root, proc) == {"current": 10}


def test_control_groups_of_version_1_and_their_way_of_saying_no_limit(tmp_path):
    root = tmp_path / "cgroup"
    write(root / "memory", memory__usage_in_bytes="7\n", memory__limit_in_bytes="9223372036854771712\n")
    assert cgroup_memory(root, tmp_path) == {"current": 7}


def test_the_own_control_group_of_version_1_comes_before_the_root_one(tmp_path):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(root / "memory" / "a", memory__usage_in_bytes="10\n", memory__limit_in_bytes="100\n")
    write(root / "memory", memory__usage_in_bytes="999\n")
    write(proc, cgroup="5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    assert cgroup_memory(root, proc) == {"current": 10, "max": 100}


@pytest.mark.parametrize(
    ("stat", "headroom"), [("anon 60\ninactive_file 25\n", 65), ("cache 3\ntotal_inactive_file 30\n", 70), ("", 40)]
)
def test_what_is_left_of_the_group_counts_pages_that_can_be_dropped(tmp_path, stat, headroom):
    root = write(tmp_path / "cgroup", memory__current="60\n", memory__max="100\n", memory__stat=stat)
    assert oom_headroom_bytes(root, tmp_path) == headroom


def test_without_a_limit_the_machine_is_the_limit(tmp_path):
    total = psutil.virtual_memory().total
    assert 0 < oom_headroom_bytes(tmp_path, tmp_path) < total
    huge = write(tmp_path / "cgroup", memory__current="60\n", memory__max=f"{1 << 59}\n")
    assert 0 < oom_headroom_bytes(huge, tmp_path) < total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_resident_once_it_is_touched():
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    if resident_tensor_bytes(tensor) is None:
        pytest.skip("this system does not tell which pages are there")
    before = resident_tensor_bytes(tensor)
    tensor[: 16 << 20] = 1
    assert (16 << 20) - 8192 <= resident_tensor_bytes(tensor) - before <= (18 << 20)
    assert resident_tensor_bytes(tensor[:0]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_readings_of_this_process_agree_with_psutil():
    kinds = process_memory()
    resident = kinds["rss_anon"] + kinds["rss_file"] + kinds["rss_shmem"]
    assert resident == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)
    assert kinds["peak"] >= kinds["rss_anon"]


def test_available_memory_is_no_more_than_the_machines():
    assert 0 <= available_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_there_are_no_cuda_readings():
    assert cuda_memory() == {}
