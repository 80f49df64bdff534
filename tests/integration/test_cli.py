"""The offline verbs as a user types them, on a tiny checkpoint."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from models.cli import make_cli
from models.config import BuildConfig
from models.scheme import QuantScheme
from tests.support.tiny_checkpoints import CORPUS, tiny_config, train_tokenizer, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("build", "eval", "inspect")
SMALL = ("--out", "OUT", "--group-size", "32", "--sequence-length", "32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    values = tiny_config(hidden_size=64, intermediate_size=96)
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", values)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(CORPUS) * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def artifact(checkpoint, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts") / "tiny-w4"
    options = ["--calibration", str(text_file), "--num-sequences", "3", "--sequence-length", "32", "--num-holdout", "1"]
    result = run("build", str(checkpoint), "--out", str(out), "--group-size", "32", "--rank", "4", "--json", *options)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["artifact_bytes"] == sum(entry.stat().st_size for entry in out.iterdir())
    assert report["quantized_perplexity"] > 1
    assert report["peak_memory_bytes"] > 0
    return out


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(make_cli(), list(arguments), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def test_eval_of_the_dense_checkpoint_agrees_with_transformers(checkpoint, text_file):
    result = run("eval", str(checkpoint), "--text", str(text_file), "--window", "40", "--dtype", "float32", "--json")
    measured = json.loads(result.stdout)
    ids = torch.tensor(train_tokenizer().encode(text_file.read_text(encoding="utf-8")).ids)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), 40):
            window = ids[start : start + 40]
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    assert measured["num_tokens"] == count
    assert measured["nll"] == pytest.approx(total / count, abs=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_eval_of_the_artifact_prints_a_table_for_people(artifact, text_file):
    output = run("eval", str(artifact), "--text", str(text_file), "--window", "32", "--max-windows", "2").stdout
    assert "perplexity" in output
    assert "62 tokens in 2 windows" in output


def test_inspect_shows_scheme_method_and_the_backend_of_every_layer(artifact):
    output = run("inspect", str(artifact), "--layers").stdout
    for expected in ("INT4 asymmetric, group 32", "qera-exact, rank 4", "corpus.txt", "backend", "1.mlp.down"):
        assert expected in output
    values = json.loads(run("inspect", str(artifact), "--json").stdout)
    assert sum(values["backends"].values()) == 14
    assert values["format"] == "qerve-1"


def test_options_override_the_configuration_file(checkpoint, text_file, tmp_path):
    config = tmp_path / "recipe.toml"
    base = BuildConfig.from_dict({"scheme": {"num_bits": 3, "group_size": 32}, "reconstruct": {"rank": 2}})
    base.write(config)
    out = tmp_path / "a"
    run("build", str(checkpoint), "--out", str(out), "--config", str(config), "--num-bits", "5", "--calibration",
        "none", "--method", "lqer")  # fmt: skip
    build = json.loads((out / "quantization.json").read_text(encoding="utf-8"))["build"]
    assert (build["scheme"]["num_bits"], build["scheme"]["group_size"]) == (5, 32)
    assert QuantScheme(**build["scheme"]).max_code == 31
    assert build["reconstruct"]["rank"] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_one_example(verb):
    output = run(verb, "--help").stdout
    assert f"Example: qerve {verb} " in " ".join(output.split())


def test_help_names_defaults_that_brackets_could_hide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert "Bits per code, 2 to 8. [default: 4]" in run("build", "--help").stdout


def qerve(*arguments):
    code = "from models.cli import make_cli, run_cli; run_cli(make_cli())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_mistake_is_one_line_on_stderr_and_exit_status_1(tmp_path):
    done = qerve("inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "nothing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "CHECKPOINT", "--out", "OUT", "--num-bits", "9"), "num_bits is 9"),
        (("build", "CHECKPOINT", "--out", "OUT", "--factor-dtype", "int3"), "factor_dtype"),
        (("build", "CHECKPOINT", *SMALL, "--calibration", "absent.txt"), "absent.txt"),
        (("build", "OUT", "--out", "OUT"), "no such file"),
        (("eval", "CHECKPOINT", "--text", "OUT"), "cannot be read"),
    ],
)
def test_mistakes_say_what_is_wrong(checkpoint, tmp_path, arguments, message):
    names = {"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(make_cli(), [names.get(word, word) for word in arguments])
    assert message in str(result.exception)
