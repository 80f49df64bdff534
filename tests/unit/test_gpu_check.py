"""`make gpu-check` without a GPU, and what it would write with one; the extra that brings the GPU kernels."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from models.cli import make_cli
from models.kernels.triton import environment
from models.scheme import QuantScheme
from tests.conftest import pytest_collection_modifyitems
from tests.support.artifact_builder import LinearKind
from tests.support.gpu import why_no_gpu
from tests.support.native_network import network_of, save
from tools import gpu_check
from tools.gpu_check import NO_GPU, Outcome, card_section, with_section

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {
    "card": "NVIDIA H100 80GB HBM3",
    "driver": "570.1",
    "torch": "2.13, CUDA 12.8",
    "triton": "3.3",
    "date": "2030-01-02",
}
REPORT = {
    "aims": [
        {"name": "decoding", "wanted": "at least 85 %", "value": 0.871, "is_met": True},
        {"name": "W4A8", "wanted": "more than 100 %", "value": 0.9, "is_met": False},
        {"name": "correction", "wanted": "less than 5 %", "value": None, "is_met": None},
    ],
    "metrics": {
        "decode 1": {"unit": "tokens/s", "median": 123.4},
        "1 x 2, M 1, cuBLAS bf16": {"unit": "s", "median": 1e-6},
    },
    "shares": {"decode 1": {"of_limit": 0.871}},
    "layers": [
        {"shape": {"out_features": 4096, "in_features": 1024}, "num_rows": 8, "contender": "qerve W4A16",
         "seconds": 2e-6, "limit_share": 0.5, "of_cublas": 3.0, "rank_share": None},
    ],
    "not_measured": {"1 x 2, gemlite W4A16": "gemlite cannot be used: No module named 'gemlite'"},
}  # fmt: skip
PASSED = Outcome(0, "....\n4 passed in 3 s\n")


def section(tests=PASSED, bench=None) -> str:
    return card_section(ABOUT, tests, bench or Outcome(0, f"noise\n{json.dumps(REPORT)}\n"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_written_and_the_reason_is_said(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(results)])
    assert gpu_check.main() == NO_GPU
    assert NO_GPU not in {0, 1}
    assert not results.exists()
    assert "nothing was run" in capsys.readouterr().err


@pytest.mark.parametrize(("tests", "bench", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_with_a_gpu_the_status_is_that_of_tests_and_bench(tmp_path, monkeypatch, capsys, tests, bench, status):
    results, ran = tmp_path / "results.md", []

    def run(command):
        ran.append(command)
        return Outcome(tests, "1 passed") if "pytest" in command else Outcome(bench, json.dumps(REPORT))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "machine", lambda: ABOUT)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(results)])
    assert gpu_check.main() == status
    assert ran == [gpu_check.TESTS, gpu_check.BENCH]
    assert "## NVIDIA H100" in results.read_text(encoding="utf-8")


def test_kernels_run_on_the_gpu_and_not_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; print(os.environ['TRITON_INTERPRET']); sys.stderr.write('why'); sys.exit(int(sys.argv[1]))"
    assert gpu_check.run((sys.executable, "-c", code, "0")) == Outcome(0, "0\n")
    assert gpu_check.run((sys.executable, "-c", code, "2")) == Outcome(2, "0\nwhy")


def test_a_section_names_card_versions_commands_and_every_verdict():
    text = section()
    assert text.startswith("## NVIDIA H100 80GB HBM3\n")
    for value in list(ABOUT.values())[1:]:
        assert value in text
    assert "`qerve bench --device cuda --random llama-2-7b" in text
    assert "Tests: passed: 4 passed in 3 s" in text
    assert "| decoding | at least 85 % | 87.1% | yes |" in text
    assert "| W4A8 | more than 100 % | 90.0% | **no** |" in text
    assert "| correction | less than 5 % | - | not measured |" in text
    assert "| decode 1 | 123.4 tokens/s | 87.1% |" in text
    assert "| 4096 x 1024 | 8 | qerve W4A16 | 2.0 | 50.0% | 3.00x | - |" in text
    assert "No module named 'gemlite'" in text


def test_failures_are_written_down():
    text = section(Outcome(1, "1 failed, 3 passed"), Outcome(1, "QerveError: out of memory"))
    assert "Tests: FAILED: 1 failed, 3 passed" in text
    assert "Bench: FAILED with exit status 1: QerveError: out of memory" in text


def test_a_card_is_written_over_and_others_stay():
    other = section().replace("H100 80GB HBM3", "L4")
    document = with_section(with_section("# Results\n\nIntroduction.\n", section()), other)
    again = with_section(document, section(Outcome(1, "2 failed")))
    assert again.count("## NVIDIA H100") == again.count("## NVIDIA L4") == 1
    assert again.startswith("# Results\n\nIntroduction.\n")
    assert "2 failed" in again
    assert with_section(again, section(Outcome(1, "2 failed"))) == again


def test_gpu_tests_say_why_they_do_not_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in why_no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in why_no_gpu()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert why_no_gpu() is None


class FakeItem:
    """What a collected test is asked for."""

    def __init__(self, *marks: str) -> None:
        self.marks, self.added = marks, []

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.added.append((mark.name, mark.kwargs["reason"]))


@pytest.mark.parametrize("has_gpu", [True, False])
def test_only_marked_tests_are_skipped_and_only_without_a_gpu(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    marked, other = FakeItem("slow", "gpu"), FakeItem("slow")
    pytest_collection_modifyitems([marked, other])
    assert marked.added == ([] if has_gpu else [("skip", why_no_gpu())])
    assert other.added == []


def requirements() -> dict[str, list[Requirement]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(it) for it in texts] for extra, texts in named.items()}


def test_the_gpu_extra_is_triton_and_nothing_else():
    found = requirements()
    (only,) = found["gpu"]
    assert only.name == "triton"
    assert only.marker is not None
    assert not only.marker.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"})
    assert only.marker.evaluate({"platform_system": "Linux", "platform_machine": "x86_64"})
    assert "triton" not in {it.name for it in found[""]}


@pytest.mark.parametrize("version", [None, "9.9"])
def test_inspect_says_whether_there_is_triton_and_how_to_get_it(monkeypatch, tmp_path, version):
    monkeypatch.setattr(environment, "_installed_version", lambda: version)
    saved = save(tmp_path / "tiny", network_of(LinearKind(QuantScheme(group_size=32), rank=4)))
    result = CliRunner().invoke(make_cli(), ["inspect", str(saved.path), "--json"])
    assert result.exit_code == 0, result.exception
    assert ("pip install 'qerve[gpu]'" in result.stdout) is (version is None)
    assert "9.9" in result.stdout or version is None
