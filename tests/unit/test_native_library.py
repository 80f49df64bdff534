"""The loader finds the native library in every place it may lie, and names the reason where it cannot be used."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.kernels.native import library
from models.kernels.native.environment import NativeEnvironment
from models.kernels.native.library import ABI_VERSION, LIBRARY_NAME, NOTE_NAME, NativeLibrary, load_library
from tests.conftest import ROOT

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler: the stand-in library cannot be built")

# Stands in for the kernels: VERSION and BEST are set when it is compiled; it knows "portable" and its best set.
STAND_IN = """
#include <stdio.h>
#include <string.h>
int qerve_abi_version(void) { return VERSION; }
const char* qerve_isa_choose(const char* forced, char* error, int size) {
    if (forced == NULL || strcmp(forced, BEST) == 0) return BEST;
    if (strcmp(forced, "portable") == 0) return "portable";
    snprintf(error, size, "this machine cannot run %s: it lacks NERVES", forced);
    return NULL;
}
void qerve_isa_compiled(char* names, int size) { snprintf(names, size, BEST ", portable"); }
"""


def compile_stand_in(path: Path, version: int = ABI_VERSION, best: str = "avx9", source: str = STAND_IN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-fPIC", f"-DVERSION={version}", f'-DBEST="{best}"', "-x", "c", "-", "-o", str(path)]
    subprocess.run([str(COMPILER), *flags], input=source, text=True, check=True, capture_output=True)
    return path


def loaded(result: NativeLibrary | str) -> NativeLibrary:
    assert isinstance(result, NativeLibrary), result
    return result


def reason(result: NativeLibrary | str) -> str:
    assert isinstance(result, str)
    return result


@needs_compiler
def test_best_set_is_chosen_unless_another_is_forced(tmp_path: Path) -> None:
    path = compile_stand_in(tmp_path / LIBRARY_NAME)
    best = loaded(load_library(NativeEnvironment(), [tmp_path]))
    assert (best.path, best.isa, best.compiled_isas) == (path, "avx9", ("avx9", "portable"))
    assert loaded(load_library(NativeEnvironment(isa="portable"), [tmp_path])).isa == "portable"


@needs_compiler
def test_named_file_comes_before_every_folder(tmp_path: Path) -> None:
    compile_stand_in(tmp_path / "a" / LIBRARY_NAME, best="folder")
    named = compile_stand_in(tmp_path / "named.so", best="named")
    assert loaded(load_library(NativeEnvironment(library_path=named), [tmp_path / "a"])).isa == "named"


@needs_compiler
def test_folders_are_looked_at_in_their_order(tmp_path: Path) -> None:
    compile_stand_in(tmp_path / "b" / LIBRARY_NAME, best="second")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert loaded(load_library(NativeEnvironment(), folders)).isa == "second"
    compile_stand_in(tmp_path / "a" / LIBRARY_NAME, best="first")
    assert loaded(load_library(NativeEnvironment(), folders)).isa == "first"


@needs_compiler
def test_forced_set_that_cannot_run_is_a_reason_not_a_substitute(tmp_path: Path) -> None:
    compile_stand_in(tmp_path / LIBRARY_NAME)
    why = reason(load_library(NativeEnvironment(isa="amx"), [tmp_path]))
    assert why == "QERVE_CPU_ISA: this machine cannot run amx: it lacks NERVES"


@needs_compiler
def test_other_interface_version_is_refused(tmp_path: Path) -> None:
    path = compile_stand_in(tmp_path / LIBRARY_NAME, version=ABI_VERSION + 1)
    why = reason(load_library(NativeEnvironment(), [tmp_path]))
    assert str(path) in why
    assert f"version {ABI_VERSION + 1}, this qerve needs {ABI_VERSION}" in why
    assert "make native" in why


@needs_compiler
def test_library_of_something_else_is_refused(tmp_path: Path) -> None:
    compile_stand_in(tmp_path / LIBRARY_NAME, source="int other(void) { return 1; }")
    assert "is not qerve's native kernel library" in reason(load_library(NativeEnvironment(), [tmp_path]))


def test_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / LIBRARY_NAME).write_text("not ELF", encoding="ascii")
    why = reason(load_library(NativeEnvironment(), [tmp_path]))
    assert why.startswith("the native kernel library cannot be loaded: ")
    assert LIBRARY_NAME in why


def test_named_file_that_is_not_there_is_a_reason_even_if_a_folder_has_one(tmp_path: Path) -> None:
    (tmp_path / LIBRARY_NAME).touch()
    why = reason(load_library(NativeEnvironment(library_path=tmp_path / "gone.so"), [tmp_path]))
    assert "gone.so" in why


def test_note_of_the_install_is_shown(tmp_path: Path) -> None:
    (tmp_path / NOTE_NAME).write_text("no working C++ compiler was found\n", encoding="utf-8")
    why = reason(load_library(NativeEnvironment(), [tmp_path / "none", tmp_path]))
    assert why.startswith("the native kernels are not built (no working C++ compiler was found): install qerve again")


def test_nothing_anywhere_is_a_reason_with_a_way_out(tmp_path: Path) -> None:
    why = reason(load_library(NativeEnvironment(), [tmp_path]))
    assert why.startswith("the native kernels are not built: ")
    assert "make native" in why


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as an editable install leaves it: metadata and library, the sources elsewhere."""
    metadata = tmp_path / "site" / "editable_thing-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: editable-thing\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(library, "DISTRIBUTION", "editable-thing")
    yield tmp_path / "site"


def test_sources_come_before_the_installed_distribution(installed: Path) -> None:
    assert list(library.library_folders()) == [ROOT / "models" / "kernels", installed / "models" / "kernels"]


def test_distribution_that_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "DISTRIBUTION", "no-such-distribution")
    assert list(library.library_folders()) == [ROOT / "models" / "kernels"]


def test_both_sides_agree_on_names_and_version() -> None:
    folder = ROOT / "models" / "kernels" / "csrc"
    headers = " ".join(path.read_text(encoding="utf-8") for path in folder.glob("*.h"))
    assert set(re.findall(r"define QERVE_ABI_VERSION (\d+)", headers)) == {str(ABI_VERSION)}
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "DESTINATION ${QERVE_INSTALL_DIR}" in cmake
    assert f"QERVE_INSTALL_DIR {library.PACKAGE_FOLDER.as_posix()})" in cmake
    assert NOTE_NAME in cmake
