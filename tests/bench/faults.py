"""A load with injected faults on the real service, watched by the real Prometheus: which alerts fired, and should they?

python -m tests.bench.faults ARTIFACT --seconds 600 --out DIR

Alerts wait for minutes, the run lasts for few: every range and every ``for`` of the rules is multiplied by
``seconds / 6000`` (600 s: a tenth; 5m becomes 30s), thresholds are as shipped. Scrapes and evaluations come every two
seconds. DIR gets report.md, report.json, series.json (every panel's data), dashboard.html and, with Chromium,
dashboard.png. The exit status is 1 when an alert did not fire that had to, or one fired that had no reason to.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from tests.bench.fault_load import Clients
from tests.bench.fault_phases import PHASES, Phase
from tests.bench.fault_picture import draw
from tests.bench.fault_report import Window, collect, judge, to_markdown
from tests.support.prometheus_server import (
    RULES,
    Prometheus,
    alertmanager,
    free_port,
    is_up,
    prometheus,
    scaled_rules,
    wait_until,
    why_no_alertmanager,
)  # fmt: skip

SHIPPED_SECONDS = 6000.0
"""Duration of a run with the rules as shipped."""
SHORTEST_RANGE = 8.0
"""A rate needs some scrapes."""
START_SECONDS = 180.0
SERVE = ("-m", "tests.bench.faulty_server", "serve")
MODEL = "faults"


@dataclass
class Service:
    """The server process, always on the same ports."""

    artifact: Path
    log: Path
    port: int
    metrics_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Without waiting for it."""
        options = {
            "port": self.port, "metrics-port": self.metrics_port, "model-name": MODEL, "max-num-seqs": 4,
            "max-queue": 64, "max-model-len": 1024, "canary-interval-seconds": 2, "drain-timeout-seconds": 5,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, *SERVE, str(self.artifact), *words], stdout=sink, stderr=sink
            )

    def wait_until_ready(self) -> None:
        """Raises AssertionError when it is not, after ``START_SECONDS``."""
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            wait_until(lambda: is_up(client, "/health/ready"), START_SECONDS, f"not ready: see {self.log}")

    def stop(self) -> None:
        """As a supervisor does."""
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def send(self, number: signal.Signals) -> None:
        """A signal to the process."""
        assert self.process is not None
        self.process.send_signal(number)


@contextmanager
def serving(artifact: Path, folder: Path) -> Iterator[Service]:
    """The service, ready."""
    service = Service(artifact, folder / "server.log", free_port(), free_port())
    service.start()
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop()


def check_probe(artifact: Path) -> None:
    """Raises SystemExit where the canary would have nothing to score."""
    manifest = json.loads((artifact / "quantization.json").read_text(encoding="utf-8"))
    if not manifest.get("probe"):
        raise SystemExit(f"{artifact} holds no probe for the canary: build it with --num-holdout 1 or more")


def restart(service: Service, times: int, pause: float) -> None:
    """Stop and start it; after the last stop it stays away for ``pause`` seconds."""
    for index in range(times):
        service.stop()
        time.sleep(pause if index == times - 1 else 0.0)
        service.start()
        service.wait_until_ready()


async def run_phase(phase: Phase, seconds: float, clients: Clients, service: Service, pause: float) -> Window:
    """One phase, from its first request to its last answer."""
    began = time.time()
    if phase.damage is not None:
        service.send(phase.damage)
    work = [clients.run(phase.load, seconds), asyncio.sleep(seconds)]
    if phase.restarts:
        work.append(asyncio.to_thread(restart, service, phase.restarts, pause))
    await asyncio.gather(*work)
    if phase.damage is not None:
        service.send(phase.damage)
        await asyncio.to_thread(service.wait_until_ready)
    return Window(phase, began, time.time())


async def run_phases(service: Service, seconds: float, pause: float) -> tuple[list[Window], Clients]:
    """Every phase in turn."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clients = Clients(service.url, MODEL, session)
        windows = []
        for phase in PHASES:
            print(f"{time.strftime('%H:%M:%S')} {phase.name}", flush=True)
            windows.append(await run_phase(phase, phase.share * seconds, clients, service, pause))
        return windows, clients


def run(artifact: Path, seconds: float, out: Path) -> dict[str, Any]:
    """The whole run; the report as ``report.json`` has it."""
    factor = seconds / SHIPPED_SECONDS
    rules = scaled_rules(RULES.read_text(encoding="utf-8"), factor, SHORTEST_RANGE)
    with ExitStack() as stack:
        service = stack.enter_context(serving(artifact, out))
        missing = why_no_alertmanager()
        manager = None if missing else stack.enter_context(alertmanager(out))
        address = f"{manager.base_url.host}:{manager.base_url.port}" if manager else None
        target = f"127.0.0.1:{service.metrics_port}"
        watcher: Prometheus = stack.enter_context(prometheus(out, target, "2s", rules, address))
        watcher.wait_for("up == 1 and on () absent(ALERTS)", START_SECONDS)
        # A lost target must stay away for longer than its alert waits.
        windows, clients = asyncio.run(run_phases(service, seconds, pause=120 * factor + 6))
        data = collect(watcher, windows, factor)
        report = judge(windows, data["firing"], hold=300 * factor + 10)
    report["factor"], report["seconds"] = factor, seconds
    report["alertmanager"] = missing or "was told"
    report["clients"] = {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(clients.seen.items())}
    report["counters"] = data["counters"]
    (out / "series.json").write_text(json.dumps(data), encoding="utf-8")
    draw(data, report, out)
    return report


def main() -> int:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    check_probe(options.artifact)
    options.out.mkdir(parents=True, exist_ok=True)
    report = run(options.artifact, options.seconds, options.out.resolve())
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (options.out / "report.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))
    return int(bool(report["missed"] or report["unexpected"]))


if __name__ == "__main__":
    sys.exit(main())
