"""Everything that only a GPU can show, in one command: ``make gpu-check``.

Runs the tests marked ``gpu`` and ``qerve bench --device cuda``, and writes what came out into ``docs/gpu-results.md``,
in a section named by the card. A later run on the same card replaces its section.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "gpu-results.md"
TESTS = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
BENCH = (
    sys.executable, "-c", "from service.cli import main; main()",
    "bench", "--device", "cuda", "--random", "llama-2-7b", "--only", "kernels,decode,batch,prefill", "--json",
)  # fmt: skip
NO_GPU = 3
"""Exit status where there is nothing to check on: neither passed (0) nor failed (1)."""
_TITLE = (
    "# Results on graphics cards\n\nWritten by `make gpu-check`, one section per card; `docs/gpu.md` explains them.\n"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one command came to: exit status and the end of what it printed."""

    status: int
    output: str


def main() -> int:
    """Check, write, and say whether everything passed."""
    parser = argparse.ArgumentParser(description="Run all GPU tests and benches on the GPU of this machine.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Document to write.")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        print(f"gpu-check: nothing was run: PyTorch {torch.__version__} ({built}) finds no GPU here", file=sys.stderr)
        return NO_GPU
    tests, bench = run(TESTS), run(BENCH)
    section = card_section(machine(), tests, bench)
    before = arguments.results.read_text(encoding="utf-8") if arguments.results.exists() else _TITLE
    arguments.results.write_text(with_section(before, section), encoding="utf-8")
    print(section)
    return 0 if tests.status == 0 and bench.status == 0 else 1


def run(command: Sequence[str]) -> Outcome:
    """``command`` in the repository, with kernels on the GPU and not in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr)


def machine() -> dict[str, str]:
    """Card, driver and versions."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    try:
        import triton

        version = str(triton.__version__)
    except ImportError as error:
        version = f"none: {error}"
    return {
        "card": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": version,
        "date": date.today().isoformat(),
    }


def card_section(about: Mapping[str, str], tests: Outcome, bench: Outcome) -> str:
    """The section of one card, in Markdown."""
    report = _report(bench)
    lines = [f"## {about['card']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items() if name != "card"]
    lines += ["", "Commands: " + " and ".join(f"`{_shown(command)}`" for command in (TESTS, BENCH)), ""]
    lines += [f"Tests: {'passed' if tests.status == 0 else 'FAILED'}: {_last_line(tests.output)}", ""]
    if report is None:
        lines += [f"Bench: FAILED with exit status {bench.status}: {_last_line(bench.output)}"]
        return "\n".join(lines) + "\n"
    lines += ["| aim | wanted | measured | met |", "|---|---|---|---|"]
    lines += [_aim(aim) for aim in report["aims"]]
    lines += ["", "| what | median | of the limit |", "|---|---|---|"]
    lines += _speeds(report)
    lines += [
        "",
        "| layer | M | way | us | of the limit | cuBLAS bf16 : this | low-rank |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_layer(row) for row in report["layers"]]
    missing = report["not_measured"]
    lines += ["", *(f"- not measured: {name}: {reason}" for name, reason in missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def with_section(document: str, section: str) -> str:
    """``document`` with ``section`` in place of the one of the same card, or at its end."""
    title = section.split("\n", 1)[0]
    parts = re.split(r"^(?=## )", document, flags=re.MULTILINE)
    kept = [part for part in parts if part.split("\n", 1)[0] != title]
    return "\n".join(part.rstrip() + "\n" for part in (*kept, section))


def _report(bench: Outcome) -> dict[str, Any] | None:
    if bench.status != 0:
        return None
    report: dict[str, Any] = json.loads(bench.output.strip().splitlines()[-1])
    return report


def _speeds(report: Mapping[str, Any]) -> list[str]:
    return [
        f"| {name} | {metric['median']:.4g} {metric['unit']} | "
        f"{_percent(report['shares'].get(name, {}).get('of_limit'))} |"
        for name, metric in report["metrics"].items()
        if metric["unit"] != "s"
    ]


def _aim(aim: Mapping[str, Any]) -> str:
    verdict = {None: "not measured", True: "yes", False: "**no**"}[aim["is_met"]]
    return f"| {aim['name']} | {aim['wanted']} | {_percent(aim['value'])} | {verdict} |"


def _layer(row: Mapping[str, Any]) -> str:
    shape, of_cublas = row["shape"], row["of_cublas"]
    cells = [
        f"{shape['out_features']} x {shape['in_features']}",
        str(row["num_rows"]),
        row["contender"],
        f"{row['seconds'] * 1e6:.1f}",
        _percent(row["limit_share"]),
        "-" if of_cublas is None else f"{of_cublas:.2f}x",
        _percent(row["rank_share"]),
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _shown(command: Sequence[str]) -> str:
    words = " ".join(command).replace(sys.executable, "python")
    return words.replace("python -c from service.cli import main; main()", "qerve")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["nothing was printed"])[-1]


if __name__ == "__main__":
    sys.exit(main())
