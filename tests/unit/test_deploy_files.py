"""The files around the code agree with each other and with the code: the compose stack.

There is no container engine in the test environment: the compose file is checked against the published compose
schema, everything else structurally.
"""

import copy
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.deploy import PINNED_IMAGE, Instruction, dockerfile_instructions, environment_of, image_of

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_PATH = ROOT / "docker-compose.yml"


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load_yaml("docker-compose.yml")


@pytest.fixture(scope="module")
def image() -> list[Instruction]:
    """The instructions of the image that is shipped."""
    return image_of(dockerfile_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")), "cpu")


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


@pytest.mark.parametrize("path", [COMPOSE_PATH, ROOT / "deploy" / "compose.cuda.yml"], ids=lambda path: path.name)
def test_compose_file_follows_the_compose_schema(path: Path) -> None:
    checked = schema_check(path)
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


@pytest.mark.parametrize("name", ["qerve", "prometheus", "alertmanager", "grafana"])
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
    assert set(foreign) == {"prometheus", "alertmanager", "grafana"}
    for service in foreign.values():
        assert PINNED_IMAGE.fullmatch(service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"


def test_image_version_is_the_one_of_the_package(compose: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert compose["services"]["qerve"]["image"] == f"qerve:${{QERVE_VERSION:-{version}}}"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_compose_builds_stages_that_there_are(compose: dict[str, Any]) -> None:
    instructions = dockerfile_instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    cuda = load_yaml("deploy/compose.cuda.yml")["services"]["qerve"]
    for target in (compose["services"]["qerve"]["build"]["target"], cuda["build"]["target"]):
        assert image_of(instructions, target)
    assert cuda["image"] == compose["services"]["qerve"]["image"] + "-cuda"


# --- Prometheus and Grafana ------------------------------------------------------------------------------------------


def test_prometheus_scrapes_the_port_that_the_service_listens_on(
    compose: dict[str, Any], image: list[Instruction]
) -> None:
    jobs = load_yaml("deploy/prometheus/prometheus.yml")["scrape_configs"]
    targets = [target for job in jobs for config in job["static_configs"] for target in config["targets"]]
    exposed = next(step.arguments for step in image if step.name == "EXPOSE")
    assert targets == [f"qerve:{exposed}"]
    assert environment_of(image)["QERVE_PORT"] == exposed
    assert compose["services"]["qerve"]["ports"] == [f"127.0.0.1:${{QERVE_PORT:-8000}}:{exposed}"]


def test_prometheus_reads_the_mounted_configuration(compose: dict[str, Any]) -> None:
    service = compose["services"]["prometheus"]
    configured = next(a.split("=", 1)[1] for a in service["command"] if a.startswith("--config.file="))
    assert (configured, True) in [(target, is_read_only) for _, target, is_read_only in mounts_of(service)]


def test_prometheus_reads_the_mounted_rules_and_tells_alertmanager(compose: dict[str, Any]) -> None:
    config = load_yaml("deploy/prometheus/prometheus.yml")
    mounts = {target: source for source, target, _ in mounts_of(compose["services"]["prometheus"])}
    (pattern,) = config["rule_files"]
    assert list((ROOT / mounts[str(Path(pattern).parent)]).glob(Path(pattern).name))
    (told,) = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    host, port = told.split(":")
    assert compose["services"][host]["ports"][0].endswith(f":{port}")


def test_alertmanager_reads_the_mounted_configuration_and_joins_no_cluster(compose: dict[str, Any]) -> None:
    service = compose["services"]["alertmanager"]
    configured = next(a.split("=", 1)[1] for a in service["command"] if a.startswith("--config.file="))
    assert (configured, True) in [(target, is_read_only) for _, target, is_read_only in mounts_of(service)]
    assert "--cluster.listen-address=" in service["command"]


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
