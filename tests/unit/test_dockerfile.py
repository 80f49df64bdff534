"""What the image is built from, and how it runs; read from its files, since there is no container engine in tests."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.deploy import (
    PINNED_IMAGE,
    Instruction,
    dockerfile_instructions,
    environment_of,
    image_of,
    is_ignored,
)

ROOT = Path(__file__).resolve().parents[2]
# Beside the interpreter: the environment's programs need not be on the search path.
HADOLINT = Path(sys.executable).with_name("hadolint")
DOCKERIGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    return dockerfile_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def image(dockerfile: list[Instruction], request: pytest.FixtureRequest) -> list[Instruction]:
    return image_of(dockerfile, request.param)


def test_hadolint_has_no_complaint() -> None:
    linted = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_hadolint_notices_a_bad_line(tmp_path: Path) -> None:
    bad = (
        (ROOT / "Dockerfile")
        .read_text(encoding="utf-8")
        .replace('ENTRYPOINT ["qerve", "serve"]', "ENTRYPOINT qerve serve")
    )
    (tmp_path / "Dockerfile").write_text(bad, encoding="utf-8")
    linted = subprocess.run(
        [HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60
    )
    assert "DL3025" in linted.stdout


def test_base_image_is_pinned_to_a_supported_python_and_every_stage_builds_on_it(dockerfile: list[Instruction]) -> None:
    stages = [step.arguments.split(" AS ") for step in dockerfile if step.name == "FROM"]
    names = {name for _, name in stages}
    (foreign,) = [image for image, _ in stages if image not in names]
    assert PINNED_IMAGE.fullmatch(foreign)
    assert foreign.startswith("python:3.11.")
    assert "-slim" in foreign
    assert stages[-1][1] == "cpu"  # what `docker build .` makes


def test_every_copied_file_exists_and_is_in_the_build_context(dockerfile: list[Instruction]) -> None:
    local = [
        step.arguments.split()[:-1] for step in dockerfile if step.name == "COPY" and "--from" not in step.arguments
    ]
    names = [name.rstrip("/") for names in local for name in names]
    assert set(names) == {"pyproject.toml", "CMakeLists.txt", "README.md", "models", "service"}
    for name in names:
        assert (ROOT / name).exists()
        assert not is_ignored(name, DOCKERIGNORE)


def test_image_runs_as_an_unprivileged_numeric_user(image: list[Instruction]) -> None:
    users = [step.arguments for step in image if step.name == "USER"]
    assert users == ["10001:10001"]  # numeric: an orchestrator can verify that it is not root
    assert image[-1].name == "USER"


def test_entry_point_gets_signals_and_is_a_declared_console_script(image: list[Instruction]) -> None:
    by_name = {step.name: step for step in image}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    entry = by_name["ENTRYPOINT"].exec_form()
    assert entry == ["qerve", "serve"]
    assert entry[0] in scripts
    assert by_name["CMD"].exec_form() == ["/artifacts/model"]


def test_image_is_offline_and_writes_only_to_tmp(image: list[Instruction]) -> None:
    environment = environment_of(image)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["QERVE_HOST"] == "0.0.0.0"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["HOME"] == "/tmp"
    assert environment.get("TRITON_CACHE_DIR", "/tmp/").startswith("/tmp/")


def test_image_carries_an_environment_and_no_build_tools(dockerfile: list[Instruction]) -> None:
    for target, programs in (("cpu", set()), ("cuda", {"apt-get", "gcc"})):  # Triton needs a compiler when it runs
        image = image_of(dockerfile, target)
        commands = " ".join(step.arguments for step in image if step.name == "RUN")
        assert set(re.findall(r"\b(apt-get|pip|gcc|g\+\+|build-essential|cmake|curl|wget)\b", commands)) == programs
        copied = [step.arguments for step in image if step.name == "COPY"]
        assert copied == [f"--from=environment-{target} /opt/qerve /opt/qerve"]


def test_variants_differ_in_their_requirements_only(dockerfile: list[Instruction]) -> None:
    def commands(target: str) -> list[str]:
        steps = image_of(dockerfile, f"environment-{target}")
        return [step.arguments for step in steps if step.name in {"RUN", "COPY"} and "-r " not in step.arguments]

    assert commands("cpu") == commands("cuda")
    listing = next(text for text in commands("cpu") if "tomllib" in text)
    assert "optional-dependencies" in listing
    assert (
        "gpu"
        in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )


@contextmanager
def readiness_probe(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers everything with ``status``; gives its port and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1], paths
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def run_health_check(image: list[Instruction]) -> Any:
    command = next(step for step in image if step.name == "HEALTHCHECK").exec_form()
    assert command is not None
    assert command[0] == "python"

    def run(port: int) -> int:
        # A proxy in the environment must not be asked about the own container.
        environment = {**os.environ, "QERVE_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(
            [sys.executable, *command[1:]], env=environment, check=False, capture_output=True, timeout=30
        ).returncode

    return run


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_health_check_follows_the_readiness_probe(run_health_check: Any, status: int, is_healthy: bool) -> None:
    with readiness_probe(status) as (port, paths):
        assert (run_health_check(port) == 0) is is_healthy
    assert paths == ["/health/ready"]


def test_health_check_fails_when_nothing_listens(run_health_check: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert run_health_check(unused.getsockname()[1]) != 0


# --- .dockerignore ---------------------------------------------------------------------------------------------------


def test_build_context_holds_the_sources() -> None:
    files = [
        path
        for top in ("models", "service")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".py", ".typed", ".cpp", ".h", ".map"} or path.name == "CMakeLists.txt"
    ]
    assert len(files) > 20
    assert [str(f) for f in files if is_ignored(f.relative_to(ROOT).as_posix(), DOCKERIGNORE)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".env", ".venv/bin/python", ".cache/models/x.gguf", "artifacts/a/model.safetensors",
        "tests/conftest.py", "id_rsa", "models/quant/__pycache__/rtn.cpython-311.pyc", "models/a.pyc",
        "models/kernels/_qerve_cpu.so", "models/kernels/_qerve_cpu.missing", "build/native/build.ninja",
    ],
)  # fmt: skip
def test_build_context_leaves_out(path: str) -> None:
    assert is_ignored(path, DOCKERIGNORE)


def test_git_does_not_ignore_the_import_packages() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = ["models/new.py", "models/build/new.py", "service/new.py", "tools/new.py", "deploy/new.yml"]
    checked = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.stdout == ""
