"""Runs the native build in the checkout's build folder, and reads the symbols of what it made."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

BUILD_SECONDS = 3600  # every kernel under two sanitizers, on a busy machine


def missing_tool(*names: str) -> str | None:
    """Why a build cannot run here, None: it can."""
    missing = [name for name in names if shutil.which(name) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """``command`` with its output kept; the variables of a surrounding `make` are not passed on."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**inherited, **variables}, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS,
    )  # fmt: skip


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """The output of a command that must not have failed."""
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def defined_symbols(binary: Path, *options: str) -> frozenset[str]:
    """Names that ``binary`` defines for other files to see; weak ones, which the linker picks one of, included."""
    lines = succeeded(run("nm", "--defined-only", *options, binary)).splitlines()
    fields = [line.split() for line in lines]
    return frozenset(field[2] for field in fields if len(field) == 3 and (field[1].isupper() or field[1] in "uvw"))


@dataclass(frozen=True)
class SharedSymbol:
    """A name that the linker merges over files compiled for different processors: any of them may come to run."""

    name: str
    isa_object: str
    other_object: str


def shared_symbols(objects: Mapping[str, frozenset[str]]) -> list[SharedSymbol]:
    """Symbols of an ``isa_*`` object that another object also defines, given the symbols of all."""
    return [
        SharedSymbol(name, isa_object, other)
        for isa_object, symbols in objects.items()
        if isa_object.startswith("isa_")
        for other, others in objects.items()
        if other != isa_object
        for name in sorted(symbols & others)
        if not name.startswith("DW.ref.")  # a pointer to the exception handler, not code
    ]
