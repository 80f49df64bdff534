"""The real Prometheus (and Alertmanager) on free ports, watching a service that runs here."""

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.ops_tools import find_tool, require_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES = ROOT / "deploy" / "prometheus" / "rules" / "qerve.yml"
PATIENCE_SECONDS = 60.0
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    client: httpx.Client

    def get(self, path: str, **parameters: object) -> Any:
        """``data`` of an answer of its API.

        Raises:
            AssertionError: it refuses, for example an expression.
        """
        response = self.client.post(path, data=parameters) if "query" in parameters else self.client.get(path)
        document = response.json()
        assert document["status"] == "success", f"{parameters}: {document}"
        return document["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What ``expression`` is now."""
        return self.get("/api/v1/query", query=expression)["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """What ``expression`` was from ``start`` to ``end``."""
        return self.get("/api/v1/query_range", query=expression, start=start, end=end, step=step)["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health and, for alerts, its state."""
        return [rule for group in self.get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def wait_for(self, expression: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Until ``expression`` has a value."""
        wait_until(lambda: bool(self.query(expression)), seconds, f"{expression} never had a value")


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS, complaint: str = "") -> None:
    """Ask again and again, for ``seconds`` at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint or "the condition never became true"
        time.sleep(0.1)


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def scaled_rules(text: str, factor: float, shortest_range: float) -> str:
    """The rules with every range and every ``for`` multiplied; ranges become ``shortest_range`` seconds at least."""

    def scale(match: re.Match[str], least: float) -> str:
        seconds = float(match["number"]) * _SECONDS[match["unit"]]
        return f"{max(round(seconds * factor), least):g}s"

    duration = r"(?P<number>\d+)(?P<unit>[smhd])"
    text = re.sub(rf"(?<=\[){duration}(?=\])", lambda match: scale(match, shortest_range), text)
    return re.sub(rf"(?<=for: ){duration}$", lambda match: scale(match, 1), text, flags=re.MULTILINE)


@contextmanager
def prometheus(
    folder: Path, target: str, interval: str, rules: str | None = None, alertmanager: str | None = None
) -> Iterator[Prometheus]:
    """The shipped configuration with another target and ``interval``; ``rules``: their text, None: those shipped."""
    program = require_tool("prometheus")
    (folder / "rules.yml").write_text(RULES.read_text(encoding="utf-8") if rules is None else rules, encoding="utf-8")
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(folder / "rules.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager] if alertmanager else []}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    options = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        running([program, *options], folder / "prometheus.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client,
    ):
        wait_until(
            lambda: is_up(client, "/-/ready"), complaint=f"Prometheus did not start: {folder / 'prometheus.log'}"
        )
        yield Prometheus(client)


DEBIAN_TEMPLATE = Path("/usr/share/prometheus/alertmanager/default.tmpl")


def why_no_alertmanager() -> str | None:
    """Debian's build reads a file of its package when it starts: unpacked only, it does not run."""
    program = find_tool("alertmanager")
    if program is None:
        return "alertmanager is not installed: `make ops-tools` fetches it"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if "debian" in version.stdout + version.stderr and not DEBIAN_TEMPLATE.exists():
        return f"{DEBIAN_TEMPLATE} is missing: apt-get install prometheus-alertmanager"
    return None


@contextmanager
def alertmanager(folder: Path) -> Iterator[httpx.Client]:
    """The shipped configuration; gives a client of its API."""
    port = free_port()
    options = [
        f"--config.file={ROOT / 'deploy' / 'alertmanager' / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (
        running([require_tool("alertmanager"), *options], folder / "alertmanager.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client,
    ):
        wait_until(lambda: is_up(client, "/-/ready"), complaint="Alertmanager did not start")
        yield client


@contextmanager
def running(command: list[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block; what it says goes to ``log``."""
    with log.open("ab") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def is_up(client: httpx.Client, path: str) -> bool:
    """Whether ``path`` answers with 200."""
    with suppress(httpx.TransportError):
        return client.get(path).status_code == 200
    return False
