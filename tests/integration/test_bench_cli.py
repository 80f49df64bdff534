"""``qerve bench`` on a tiny artifact: every section gives numbers, the other side may crash, nothing is timed here."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from models.cli import make_cli
from models.errors import QerveError
from models.scheme import QuantScheme
from service.cli_bench import bench
from tests.support import fake_llama_cpp
from tests.support.artifact_builder import LinearKind
from tests.support.native import needs_native
from tests.support.native_network import network_of, save

SMALL = ("--allow-noise", "--repeats", "2", "--prompt-tokens", "5", "--decode-steps", "3", "--prefill-tokens", "40")
AGAINST = ("--against", "llama.cpp")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny"
    return save(path, network_of(LinearKind(QuantScheme(group_size=32), rank=4))).path


@pytest.fixture
def llama_python(tmp_path):
    """An interpreter that has a ``llama_cpp``."""
    shutil.copy(fake_llama_cpp.__file__, tmp_path / "llama_cpp.py")
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    return interpreter


def invoke(*arguments):
    cli = make_cli()
    cli.command("bench")(bench)
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def run(*arguments):
    result = invoke(*arguments, *SMALL)
    assert result.exit_code == 0, result.exception or result.output
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


@needs_native
def test_all_sections_give_numbers(artifact):
    report, out = run(artifact)
    metrics = report["metrics"]
    for name in ("decode 1", "decode 8", "decode 64", "prefill 40"):
        for metric in (name, f"{name}, kernels only", f"{name}, rank 0"):
            assert len(metrics[metric]["values"]) == 2
            assert metrics[metric]["median"] > 0
        assert 0 < report["shares"][name]["python"] < 1
        assert report["shares"][name]["of_limit"] > 0
    assert {"mixed", "read bandwidth", "8 streams, HTTP", "8 streams, engine"} <= metrics.keys()
    assert "8 streams, HTTP / 8 streams, engine" in report["ratios"]
    assert {(row["phase"], row["operator"]) for row in report["operators"]} >= {
        ("decode 1", "head"),
        ("decode 8", "attention"),
        ("prefill 40", "gate_up"),
    }
    assert report["not_measured"] == {}
    assert "of the limit" in out


@needs_native
def test_one_section_and_only_json(artifact):
    report, out = run(artifact, "--only", "decode", "--json", "--threads", "1", "--kv-cache-dtype", "int8")
    assert len(out.splitlines()) == 1
    assert report["about"]["threads"] == "1"
    assert "decode 1" in report["metrics"]
    assert "prefill 40" not in report["metrics"]
    assert report["operators"] == []


@needs_native
def test_llama_cpp_is_measured_in_the_same_rounds(artifact, llama_python, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"fine")
    report, out = run(
        artifact, "--only", "decode,prefill,batch", *AGAINST, "--gguf", gguf, "--llama-python", llama_python
    )
    for name in ("decode 1", "decode 8", "prefill 40"):
        assert len(report["metrics"][f"{name}, llama.cpp"]["values"]) == 2
        assert report["ratios"][f"{name} / {name}, llama.cpp"] > 0
        assert report["ratios"][f"{name}, rank 0 / {name}, llama.cpp"] > 0
    assert "0.0-fake, model.gguf, FAKE = 1" in report["about"]["llama.cpp"]
    assert "engine : llama.cpp" in out
    assert report["not_measured"] == {}


@needs_native
def test_a_crash_on_the_other_side_does_not_end_the_bench(artifact, llama_python, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"crashes")
    options = ("--only", "prefill", *AGAINST, "--gguf", gguf, "--llama-python", llama_python)
    report, _ = run(artifact, *options)
    assert "signal SIGSEGV; it said last:" in report["not_measured"]["prefill 40, llama.cpp"]
    assert "--llama-no-repack" in report["not_measured"]["prefill 40, llama.cpp"]
    assert len(report["metrics"]["prefill 40"]["values"]) == 2
    repaired, _ = run(artifact, *options, "--llama-no-repack")
    assert repaired["not_measured"] == {}


@needs_native
def test_a_file_that_llama_cpp_cannot_load_is_reported(artifact, llama_python, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"damaged")
    report, _ = run(artifact, "--only", "decode", *AGAINST, "--gguf", gguf, "--llama-python", llama_python)
    assert "cannot be loaded" in report["not_measured"]["llama.cpp"]
    assert report["metrics"]["decode 1"]["median"] > 0


@needs_native
def test_an_environment_without_llama_cpp_is_reported(artifact, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"fine")
    report, _ = run(artifact, "--only", "decode", *AGAINST, "--gguf", gguf)
    assert "No module named 'llama_cpp'" in report["not_measured"]["llama.cpp"]


def test_a_network_that_the_kernels_cannot_run_is_measured_without_them(tmp_path):
    saved = save(tmp_path / "tiny", network_of(LinearKind(QuantScheme(format="nf4", group_size=32), rank=4)))
    report, _ = run(saved.path, "--only", "decode,kernels,http")
    assert report["metrics"].keys() == {"decode 1", "8 streams, engine", "8 streams, HTTP"}
    assert report["not_measured"]["kernels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what is to be measured"),
        (("here", "--random", "llama-2-7b"), "what is to be measured"),
        (("/nonexistent", "--allow-noise"), "no such directory"),
        (("here", "--only", "everything"), "choose of"),
        (("here", *AGAINST), "belong together"),
        (("here", *AGAINST, "--gguf", "/nonexistent"), "no such file"),
        (("--random", "gpt-2", "--allow-noise"), "tinyllama-1.1b, llama-2-7b"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    result = invoke(*arguments)
    assert isinstance(result.exception, QerveError)
    assert message in str(result.exception)
