"""The Dockerfile's build steps, run without a container engine as far as that goes; and what the image would weigh.

What is left out: the base image, the download of the dependencies (this environment's are used), users and mounts.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import reduce
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.deploy import dockerfile_instructions, image_of, is_ignored

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BASE_IMAGE_BYTES = 130 * MIB
BUDGET_BYTES = 1200 * 10**6
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def closure(name: str, seen: set[str]) -> set[str]:
    """The distributions that ``name`` needs here, itself included."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return seen
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:
        return seen
    seen.add(key)
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            closure(requirement.name, seen)
    return seen


def size_of(name: str) -> int:
    paths = (Path(str(file.locate())) for file in distribution(name).files or [] if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file())


def project_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text).name for text in project["dependencies"]]


def test_dependencies_fit_the_size_that_the_dockerfile_states() -> None:
    if not distribution("torch").version.endswith("+cpu"):
        pytest.skip("this environment has not PyTorch's CPU build")
    names: set[str] = set()
    for name in project_requirements():
        closure(name, names)
    assert {"torch", "fastapi", "tokenizers"} <= names
    assert sum(map(size_of, names)) + BASE_IMAGE_BYTES < BUDGET_BYTES
    assert "under 1.2 GB" in DOCKERFILE


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker build` would send: tracked files that .dockerignore lets through."""
    folder = tmp_path_factory.mktemp("context")
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for top in ("pyproject.toml", "README.md", "CMakeLists.txt", "models", "service"):
        paths = [ROOT / top] if (ROOT / top).is_file() else [path for path in (ROOT / top).rglob("*") if path.is_file()]
        for path in paths:
            name = path.relative_to(ROOT).as_posix()
            if not is_ignored(name, ignore):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, folder / name)
    return folder


def run_steps(target: str, wanted: str, folders: dict[str, Path], cwd: Path) -> None:
    """The RUN instructions of ``target`` that hold ``wanted``, with the image's folders elsewhere."""
    commands = [s.arguments for s in image_of(dockerfile_instructions(DOCKERFILE), target) if s.name == "RUN"]
    chosen = [command for command in commands if wanted in command]
    assert chosen, f"no step of {target} holds {wanted}"
    for step in chosen:
        command = reduce(lambda text, pair: text.replace(pair[0], str(pair[1])), folders.items(), step)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.slow
def test_wheel_is_built_and_installed_by_the_dockerfiles_steps_and_its_entry_point_starts(
    context: Path, tmp_path: Path
) -> None:
    folders = {"/opt/qerve": tmp_path / "qerve", "/wheels": tmp_path / "wheels"}
    run_steps("wheel", "pip wheel", folders, context)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.search(r"models/kernels/_qerve_cpu\.(so|missing)$", name) for name in names)
    assert not any(name.startswith("tests/") or name.endswith((".cpp", ".h")) for name in names)

    run_steps("requirements", "venv", folders, context)
    assert "torch" in (context / "cpu.txt").read_text()
    assert "triton" in (context / "cuda.txt").read_text()
    assert "triton" not in (context / "cpu.txt").read_text()

    run_steps("environment-cpu", "/wheels/*.whl", folders, context)
    (site,) = (tmp_path / "qerve" / "lib").glob("python3*/site-packages")
    outer = Path(distribution("torch").locate_file(""))
    (site / "dependencies.pth").write_text(str(outer))
    shown = subprocess.run(
        [tmp_path / "qerve" / "bin" / "qerve", "serve", "--print-config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "drain_timeout_seconds" in shown.stdout
