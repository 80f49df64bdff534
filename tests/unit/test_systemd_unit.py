"""The systemd unit is well-formed, confined, stops as slowly as the service drains, and starts what the package has."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "systemd" / "qerve.service"
EXPOSURE = 15  # tenths; 100 is a service without any confinement
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


class Options(dict):
    """A key that is given twice keeps both values, as systemd reads it."""

    def __setitem__(self, key: str, value: object) -> None:
        if key in self and isinstance(value, list):
            value = self[key] + value
        super().__setitem__(key, value)


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False, dict_type=Options)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return dict(parser["Service"])


def analyze(unit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, check=False, timeout=60
    )


def unit_with(folder: Path, old: str = "", new: str = "") -> Path:
    """The unit with a program that exists here in place of the installed one."""
    text = UNIT.read_text(encoding="utf-8").replace("/opt/qerve/bin/qerve", "/bin/true").replace(old, new)
    (folder / "qerve.service").write_text(text, encoding="utf-8")
    return folder / "qerve.service"


@needs_systemd
def test_systemd_finds_the_unit_well_formed(tmp_path: Path) -> None:
    verified = analyze(unit_with(tmp_path), "verify")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_systemd_notices_a_misspelt_option(tmp_path: Path) -> None:
    verified = analyze(unit_with(tmp_path, "ProtectSystem=", "ProtectSystems="), "verify")
    assert "ProtectSystems" in verified.stderr


@needs_systemd
def test_service_is_confined(tmp_path: Path) -> None:
    limits = ("security", "--offline=true", f"--threshold={EXPOSURE}")
    assert analyze(unit_with(tmp_path), *limits).returncode == 0
    assert analyze(unit_with(tmp_path, "SystemCallFilter=", "#"), *limits).returncode != 0


def test_service_has_time_to_drain_and_restarts_after_failures_only(service: dict[str, str]) -> None:
    a_hung_step = 60
    drain = Settings.model_fields["drain_timeout_seconds"].default
    assert float(service["TimeoutStopSec"]) >= drain + a_hung_step
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert service["Restart"] == "on-failure"
    assert service["ExecReload"].endswith("-HUP $MAINPID")


def test_environment_names_settings_of_the_service(service: dict[str, str]) -> None:
    pairs = [pair.split("=", 1) for pair in service["Environment"].split()]
    names = {name.removeprefix("QERVE_").lower(): value for name, value in pairs if name.startswith("QERVE_")}
    assert {"host", "port", "log_format"} <= set(names)
    Settings(**names)
    assert service["ExecStart"].split()[1] == "serve"


def test_service_calls_nobody_and_has_no_rights(service: dict[str, str]) -> None:
    assert service["IPAddressDeny"] == "any"
    assert service["DynamicUser"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["MemoryMax"]
