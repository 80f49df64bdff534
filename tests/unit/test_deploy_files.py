"""The files around the code agree with each other and with the code: image and compose stack.

There is no container engine in the test environment: the compose file is checked against the published compose
schema, everything else structurally.
"""

import copy
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
import yaml

from tests.support.deploy import Instruction, dockerfile_instructions, is_ignored

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_PATH = ROOT / "docker-compose.yml"
DOCKERIGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")
PINNED_IMAGE = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.-]+)?")


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load_yaml("docker-compose.yml")


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    return dockerfile_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def final_stage(dockerfile: list[Instruction]) -> list[Instruction]:
    return [step for step in dockerfile if step.stage == dockerfile[-1].stage]


def environment_of(stage: list[Instruction]) -> dict[str, str]:
    pairs = (pair for step in stage if step.name == "ENV" for pair in step.arguments.split())
    return dict(pair.split("=", 1) for pair in pairs)


def mounts_of(service: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(source, target, is read-only) of every volume of a compose service, in either syntax."""
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            yield source, target, mode == ["ro"]
        else:
            yield volume["source"], volume["target"], volume.get("read_only", False)


# --- compose ---------------------------------------------------------------------------------------------------------


def schema_check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_compose_file_follows_the_compose_schema() -> None:
    checked = schema_check(COMPOSE_PATH)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_compose_schema_check_notices_a_misspelt_key(compose: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(compose)
    broken["services"]["qerve"]["readonly"] = broken["services"]["qerve"].pop("read_only")
    path = tmp_path / "docker-compose.yml"
    path.write_text(yaml.safe_dump(broken), encoding="utf-8")
    assert schema_check(path).returncode != 0


def test_every_mounted_file_is_in_the_repository_and_every_named_volume_is_declared(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for source, target, _ in mounts_of(service):
            if not source.startswith("."):
                assert source in compose["volumes"], f"{name} mounts an undeclared volume {source}"
            elif target != "/artifacts":  # made by a build, not part of the repository
                assert (ROOT / source).exists(), f"{name} mounts {source}, which does not exist"


def test_configuration_and_artifacts_are_mounted_read_only(compose: dict[str, Any]) -> None:
    binds = [mount for service in compose["services"].values() for mount in mounts_of(service) if mount[0][0] == "."]
    assert "/artifacts" in [target for _, target, _ in binds]
    assert [source for source, _, is_read_only in binds if not is_read_only] == []


@pytest.mark.parametrize("name", ["qerve", "prometheus", "grafana"])
def test_compose_service_is_confined(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert not service.get("privileged")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_service_has_a_writable_tmp_and_a_configurable_memory_limit(compose: dict[str, Any]) -> None:
    service = compose["services"]["qerve"]
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    assert service["mem_limit"].startswith("${QERVE_MEM_LIMIT:-")


def test_foreign_images_are_pinned_and_have_a_health_check(compose: dict[str, Any]) -> None:
    foreign = {name: service for name, service in compose["services"].items() if "build" not in service}
    assert set(foreign) == {"prometheus", "grafana"}
    for service in foreign.values():
        assert PINNED_IMAGE.fullmatch(service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"


def test_image_version_is_the_one_of_the_package(compose: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert compose["services"]["qerve"]["image"] == f"qerve:${{QERVE_VERSION:-{version}}}"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- Prometheus and Grafana ------------------------------------------------------------------------------------------


def test_prometheus_scrapes_the_port_that_the_service_listens_on(
    compose: dict[str, Any], final_stage: list[Instruction]
) -> None:
    jobs = load_yaml("deploy/prometheus/prometheus.yml")["scrape_configs"]
    targets = [target for job in jobs for config in job["static_configs"] for target in config["targets"]]
    exposed = next(step.arguments for step in final_stage if step.name == "EXPOSE")
    assert targets == [f"qerve:{exposed}"]
    assert environment_of(final_stage)["QERVE_PORT"] == exposed
    assert compose["services"]["qerve"]["ports"] == [f"127.0.0.1:${{QERVE_PORT:-8000}}:{exposed}"]


def test_prometheus_reads_the_mounted_configuration(compose: dict[str, Any]) -> None:
    service = compose["services"]["prometheus"]
    configured = next(a.split("=", 1)[1] for a in service["command"] if a.startswith("--config.file="))
    assert (configured, True) in [(target, is_read_only) for _, target, is_read_only in mounts_of(service)]


def test_grafana_reaches_prometheus(compose: dict[str, Any]) -> None:
    (source,) = load_yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    host, port = re.fullmatch(r"http://([\w-]+):(\d+)", source["url"]).groups()
    assert compose["services"][host]["ports"][0].endswith(f":{port}")
    assert host in compose["services"]["grafana"]["depends_on"]


def test_grafana_finds_the_dashboards_where_they_are_mounted(compose: dict[str, Any]) -> None:
    mounts = {target: source for source, target, _ in mounts_of(compose["services"]["grafana"])}
    (provider,) = load_yaml("deploy/grafana/provisioning/dashboards/qerve.yml")["providers"]
    folder = ROOT / mounts[provider["options"]["path"]]
    home = Path(compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (folder / home.name).is_file()
    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"


def test_grafana_shows_dashboards_without_a_login_and_lets_nobody_edit(compose: dict[str, Any]) -> None:
    environment = compose["services"]["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"  # no admin/admin


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def test_base_images_are_pinned_to_a_supported_python(dockerfile: list[Instruction]) -> None:
    images = [step.arguments.split()[0] for step in dockerfile if step.name == "FROM"]
    assert len(images) == 2
    assert len(set(images)) == 1  # the environment's interpreter is a link into the base image
    assert PINNED_IMAGE.fullmatch(images[0])
    assert images[0].startswith("python:3.11.")
    assert "-slim" in images[0]


def test_every_copied_file_exists_and_is_in_the_build_context(dockerfile: list[Instruction]) -> None:
    local = [
        step.arguments.split()[:-1] for step in dockerfile if step.name == "COPY" and "--from" not in step.arguments
    ]
    names = [name.rstrip("/") for names in local for name in names]
    assert set(names) == {"pyproject.toml", "README.md", "models", "service"}
    for name in names:
        assert (ROOT / name).exists()
        assert not is_ignored(name, DOCKERIGNORE)


def test_image_runs_as_an_unprivileged_numeric_user(final_stage: list[Instruction]) -> None:
    users = [step.arguments for step in final_stage if step.name == "USER"]
    assert users[-1:] == ["10001:10001"]  # numeric: an orchestrator can verify that it is not root
    after = final_stage[[step.name for step in final_stage].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & {step.name for step in after}


def test_entry_point_gets_signals_and_is_a_declared_console_script(final_stage: list[Instruction]) -> None:
    by_name = {step.name: step for step in final_stage}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    entry = by_name["ENTRYPOINT"].exec_form()
    assert entry == ["qerve", "serve"]
    assert entry[0] in scripts
    assert by_name["CMD"].exec_form() == ["/artifacts/model"]


def test_image_is_offline_and_writes_only_to_tmp(final_stage: list[Instruction]) -> None:
    environment = environment_of(final_stage)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["QERVE_HOST"] == "0.0.0.0"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["HOME"] == "/tmp"


def test_final_stage_installs_nothing(final_stage: list[Instruction]) -> None:
    commands = " ".join(step.arguments for step in final_stage if step.name == "RUN")
    assert not re.search(r"\b(apt|apt-get|pip|gcc|g\+\+|build-essential|curl|wget)\b", commands)
    assert [step.arguments for step in final_stage if step.name == "COPY"] == ["--from=build /opt/qerve /opt/qerve"]


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
def run_health_check(final_stage: list[Instruction]) -> Any:
    command = next(step for step in final_stage if step.name == "HEALTHCHECK").exec_form()
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
        path for top in ("models", "service") for path in (ROOT / top).rglob("*") if path.suffix in {".py", ".typed"}
    ]
    assert len(files) > 20
    assert [str(f) for f in files if is_ignored(f.relative_to(ROOT).as_posix(), DOCKERIGNORE)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".env", ".venv/bin/python", ".cache/models/x.gguf", "artifacts/a/model.safetensors",
        "tests/conftest.py", "id_rsa", "models/quant/__pycache__/rtn.cpython-311.pyc", "models/a.pyc",
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
