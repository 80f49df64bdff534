"""Programs that are not Python: on PATH, or where `make ops-tools` puts them; a test without its program skips."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.fetch_ops_tools import BIN


def find_tool(name: str) -> Path | None:
    """``QERVE_TOOL_NAME`` in the environment, else PATH, else the fetched one."""
    given = os.environ.get(f"QERVE_TOOL_{name.upper().replace('-', '_')}") or shutil.which(name)
    if given is not None:
        return Path(given)
    return BIN / name if (BIN / name).exists() else None


def require_tool(name: str) -> Path:
    """The program, or the test is skipped."""
    path = find_tool(name)
    if path is None:
        pytest.skip(f"{name} is not installed: `make ops-tools` fetches it")
    return path


def run_tool(name: str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Its output as text; skips the test where it is not installed."""
    command = [str(require_tool(name)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload]
