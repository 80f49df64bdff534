"""The native kernels build as promised: tested, portable, self-contained; without a compiler a note says why not."""

import os
import re
from pathlib import Path

import pytest

from models.kernels.native import NativeEnvironment, NativeLibrary, load_library
from models.kernels.native.library import LIBRARY_NAME, NOTE_NAME, PACKAGE_FOLDER
from tests.conftest import ROOT
from tests.support.native_build import defined_symbols, missing_tool, run, shared_symbols, succeeded

BUILD = ROOT / "build" / "native"
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# Two files that both keep a copy of one inline function, each with its own compiler flags.
HEADER = """
inline float half(float x) { return x / 2; }
struct A {};
template <class T> float twice(float x) { return x + x; }
"""
ISA = '#include "half.h"\nfloat (*use)(float) = half;\nfloat (*own)(float) = twice<A>;'
OTHER = '#include "half.h"\nfloat (*other)(float) = half;'


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if why := missing_tool("cmake", "ctest", "c++", "make"):
        pytest.skip(why)


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    """The library as `make native` builds it."""
    succeeded(run("make", "native"))
    loaded = load_library(NativeEnvironment(library_path=BUILD / PACKAGE_FOLDER / "csrc" / LIBRARY_NAME))
    assert isinstance(loaded, NativeLibrary), loaded
    return loaded


@pytest.fixture(scope="module")
def objects(library: NativeLibrary) -> dict[str, frozenset[str]]:
    """Symbols that each object file of the library defines, by its source's name."""
    if why := missing_tool("nm"):
        pytest.skip(why)
    sources = {path.name for path in (ROOT / PACKAGE_FOLDER / "csrc").glob("*.cpp")}
    built = {path.name.removesuffix(".o"): path for path in library.path.parent.rglob("*.cpp.o")}
    assert "library_info.cpp" in built
    return {name: defined_symbols(path) for name, path in built.items() if name in sources}


def test_native_tests_pass(library: NativeLibrary) -> None:
    succeeded(run("cmake", "--build", BUILD, "--target", "qerve_cpu_tests"))
    # Emulated processors take minutes: `make native-test` has them.
    output = succeeded(run("ctest", "--test-dir", BUILD, "--verbose", "--label-exclude", "emulated"))
    counts = re.findall(r"(\d+) cases, (\d+) failed", output)
    assert counts
    assert all(int(num_run) > 10 and num_failed == "0" for num_run, num_failed in counts)


def test_library_in_the_tree_is_the_one_that_was_built(library: NativeLibrary) -> None:
    in_tree = ROOT / PACKAGE_FOLDER / LIBRARY_NAME
    assert in_tree.read_bytes() == library.path.read_bytes()
    found = load_library(NativeEnvironment())
    assert isinstance(found, NativeLibrary)
    assert found.path == in_tree


def test_every_source_of_this_architecture_is_in_the_library(
    library: NativeLibrary, objects: dict[str, frozenset[str]]
) -> None:
    names = {
        "isa_amx.cpp": "amx", "isa_avx512.cpp": "avx512-vnni", "isa_avxvnni.cpp": "avx-vnni", "isa_avx2.cpp": "avx2",
        "isa_neon.cpp": "neon-dotprod", "isa_portable.cpp": "portable",
    }  # fmt: skip
    compiled = {source for source in objects if source.startswith("isa_")}
    assert compiled <= set(names)
    assert set(library.compiled_isas) == {names[source] for source in compiled} | {"portable"}


def test_each_compiled_set_runs_or_says_what_is_missing(library: NativeLibrary) -> None:
    assert library.isa in library.compiled_isas
    for isa in library.compiled_isas:
        forced = load_library(NativeEnvironment(library_path=library.path, isa=isa))
        if isinstance(forced, NativeLibrary):
            assert forced.isa == isa
        else:
            assert re.fullmatch(rf"QERVE_CPU_ISA: this machine cannot run {isa}: it lacks .+", forced)
    refused = load_library(NativeEnvironment(library_path=library.path, isa="abacus"))
    assert isinstance(refused, str)
    assert 'no instruction set "abacus"' in refused


def test_code_for_one_processor_is_not_shared_with_the_others(objects: dict[str, frozenset[str]]) -> None:
    assert shared_symbols(objects) == []


def test_shared_code_would_be_noticed(tmp_path: Path) -> None:
    if why := missing_tool("nm"):
        pytest.skip(why)
    (tmp_path / "half.h").write_text(HEADER, encoding="utf-8")
    symbols = {}
    for name, text in {"isa_a": ISA, "b": OTHER}.items():
        (tmp_path / f"{name}.cpp").write_text(text, encoding="utf-8")
        succeeded(run("c++", "-O2", "-c", f"{name}.cpp", cwd=tmp_path))
        symbols[name] = defined_symbols(tmp_path / f"{name}.o")
    assert [symbol.name.lstrip("_") for symbol in shared_symbols(symbols)] == ["Z4halff"]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="reads ELF files")
def test_library_shows_its_interface_and_needs_the_c_library_only(library: NativeLibrary) -> None:
    if why := missing_tool("nm", "readelf"):
        pytest.skip(why)
    exported = defined_symbols(library.path, "--dynamic")
    assert "qerve_abi_version" in exported
    assert [name for name in exported if not name.startswith("qerve_")] == []
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", succeeded(run("readelf", "--dynamic", library.path))))
    assert needed <= SYSTEM_LIBRARIES


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_without_a_working_compiler_a_note_is_installed(tmp_path: Path, compiler: str) -> None:
    output = succeeded(run("cmake", "-S", ROOT, "-B", tmp_path / "build", CXX=compiler))
    assert "The native CPU kernels are not built" in output
    succeeded(run("cmake", "--build", tmp_path / "build"))
    succeeded(run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "site"))
    folder = tmp_path / "site" / PACKAGE_FOLDER
    assert [path.name for path in folder.iterdir()] == [NOTE_NAME]
    reason = load_library(NativeEnvironment(), [folder])
    assert isinstance(reason, str)
    assert "(no working C++ compiler was found when qerve was installed)" in reason


def test_make_goes_on_without_cmake() -> None:
    output = succeeded(run("make", "native", "CMAKE=/nonexistent/cmake"))
    assert "the native kernels are those that pip built" in output


@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    output = succeeded(run("make", "native-test"))
    assert output.count("100% tests passed") == 3


@pytest.mark.slow
def test_arm_build_passes_under_the_emulator() -> None:
    output = succeeded(run("make", "native-neon"))
    if why := re.search(r"^skipped: (.+)$", output, re.MULTILINE):
        pytest.skip(why[1])
    assert "100% tests passed" in output
