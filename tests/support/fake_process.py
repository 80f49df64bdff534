"""``qerve serve`` in a process of its own, with the fake model in the place of an artifact.

python -m tests.support.fake_process '{"load_seconds": 1}' DIRECTORY [options of qerve serve]
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.api_server import PATIENCE_SECONDS, wait_until
from tests.support.fake_model import FakeModel, FakeParts, Faults

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    """A serving process and a client for it."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def status(self, path: str) -> int | None:
        """Status of a GET; None: nobody answers yet."""
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return None

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or self.status("/health/ready") == 200)
        assert self.process.poll() is None, self.log


@contextmanager
def fake_process(tmp_path: Path, *options: str, log: Path | None = None, **faults: Any) -> Iterator[ServerProcess]:
    """The server, started but maybe not loaded yet; killed at the end if it still runs."""
    port = _free_port()
    log_path = log or tmp_path / "server.log"
    command = [sys.executable, "-m", "tests.support.fake_process", json.dumps(faults), str(tmp_path)]
    command += ["--port", str(port), "--model-name", "fake", "--kv-cache-memory", "16KiB", *options]
    environment = {name: value for name, value in os.environ.items() if not re.match("QERVE_", name)}
    with log_path.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            yield ServerProcess(process, client, log_path)
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    from service.listener import bind

    with bind("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Serve as ``qerve serve`` does."""
    from models.cli import run_cli
    from models.errors import ArtifactError
    from service import process
    from service.cli_serve import serve

    faults = json.loads(sys.argv.pop(1))
    load_seconds, is_damaged = faults.pop("load_seconds", 0.0), faults.pop("is_damaged", False)

    def load(*_: Any, **__: Any) -> Any:
        time.sleep(load_seconds)
        if is_damaged:
            raise ArtifactError("the artifact was told to be damaged")
        return FakeParts(model=FakeModel(faults=Faults(**faults))).loaded()

    process.load_artifact = load

    import typer

    cli = typer.Typer()
    cli.command()(serve)
    run_cli(cli)


if __name__ == "__main__":
    main()
