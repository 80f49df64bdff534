"""`make` creates and reuses the environment as promised, and CI runs what a developer runs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Stands in for an interpreter: `-c` passes, `-m venv DIR` copies itself there, `-m pip` is written down.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) exit 0 ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") shift 2; echo "$@" >> pip.log; test ! -e pip-fails ;;
esac
"""


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with a stand-in for CMake: nothing is compiled here."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"
    }
    command = ["make", "CMAKE=true", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and a stand-in for Python."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / "fake-python"
    fake.write_text(FAKE_PYTHON, encoding="utf-8")
    fake.chmod(0o755)
    return tmp_path


def installs(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@needs_make
def test_second_make_reuses_the_environment_until_pyproject_changes(checkout: Path) -> None:
    arguments = ["venv", "PYTHON=./fake-python"]
    assert make(checkout, *arguments).returncode == 0
    assert make(checkout, *arguments).returncode == 0
    assert len(installs(checkout)) == 1
    later = (checkout / ".venv" / ".installed-dev").stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (later, later))
    assert make(checkout, *arguments).returncode == 0
    assert len(installs(checkout)) == 2


@needs_make
def test_demo_installs_without_the_development_tools_and_not_again_after_them(checkout: Path) -> None:
    assert make(checkout, "demo", "PYTHON=./fake-python").returncode == 0
    assert [line.endswith("--editable .") for line in installs(checkout)] == [True]
    assert make(checkout, "test", "PYTHON=./fake-python").returncode == 0
    assert installs(checkout)[1].endswith("--editable .[dev]")
    assert make(checkout, "demo", "PYTHON=./fake-python").returncode == 0
    assert len(installs(checkout)) == 2


@needs_make
def test_failed_install_fails_make_and_is_tried_again(checkout: Path) -> None:
    (checkout / "pip-fails").touch()
    assert make(checkout, "venv", "PYTHON=./fake-python").returncode != 0
    (checkout / "pip-fails").unlink()
    assert make(checkout, "venv", "PYTHON=./fake-python").returncode == 0
    assert len(installs(checkout)) == 2


@needs_make
def test_torch_index_reaches_pip_only_when_given(checkout: Path) -> None:
    make(checkout, "venv", "PYTHON=./fake-python")
    assert "--extra-index-url" not in installs(checkout)[0]
    shutil.rmtree(checkout / ".venv")
    make(checkout, "venv", "PYTHON=./fake-python", "TORCH_INDEX=file:///wheels")
    assert "--extra-index-url file:///wheels" in installs(checkout)[1]


@needs_make
def test_too_old_python_is_refused_with_a_way_out(checkout: Path) -> None:
    tried = make(checkout, "venv", "PYTHON=false no-such-python")
    assert tried.returncode != 0
    assert "Python 3.11 or newer" in tried.stderr
    assert "make PYTHON=" in tried.stderr
    assert installs(checkout) == []


@needs_make
@pytest.mark.parametrize(("arguments", "is_once"), [((), False), (("ONCE=1",), True), (("ONCE=0",), False)])
def test_demo_ends_after_the_summary_only_when_asked(checkout: Path, arguments: tuple[str, ...], is_once: bool) -> None:
    planned = make(checkout, "--dry-run", "demo", "PORT=8123", *arguments).stdout
    assert "tools.demo --port 8123" in planned
    assert ("--once" in planned) is is_once


@needs_make
def test_help_lists_every_target(checkout: Path) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (checkout / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(r"^  make ([a-z-]+)", make(checkout, "help").stdout, re.MULTILINE)
    assert sorted(shown) == sorted(phony[1].split())


def test_ci_runs_the_same_targets_as_a_developer() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands == ["make quality", "make test"]
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
