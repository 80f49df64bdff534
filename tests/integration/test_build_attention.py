"""Builds for quantized queries, keys and values, and with clipped activations: what is built is what is served."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from models.artifact.execution import RunOptions
from models.artifact.load import load_artifact
from models.build import build_artifact
from models.build.plan import check_build
from models.cli import make_cli
from models.config import BuildConfig, CalibrationConfig, ReconstructConfig
from models.errors import SchemeError
from models.evaluate.load import load_for_evaluation
from models.evaluate.perplexity import score_window, summarize
from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.config import LlamaConfig
from models.llama.model import Attention, LlamaForCausalLM
from models.scheme import ActivationScheme, QuantScheme
from tests.support.artifact_builder import sign_again
from tests.support.builds import digests
from tests.support.tiny_checkpoints import VOCAB_SIZE, random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES, NUM_HOLDOUT = 24, 6, 2
ATTENTION = ActivationScheme(3, 32)
VALUES = tiny_config(hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tensors = random_tensors(VALUES)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].bfloat16().float()
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), VALUES, tensors)))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    count = (NUM_SEQUENCES + NUM_HOLDOUT) * LENGTH
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    path.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    return BuildConfig(
        scheme=QuantScheme(4, 32),
        reconstruct=ReconstructConfig("qera-exact", 4, "float32"),
        calibration=CalibrationConfig(str(path), NUM_SEQUENCES, LENGTH, 4, NUM_HOLDOUT, inputs="dense"),
    )


def served_perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    holdout = tokens.view(-1, LENGTH)[NUM_SEQUENCES:]
    return summarize([score_window(model, row, LENGTH - 1) for row in holdout]).perplexity


@pytest.mark.parametrize("inputs", ["quantized", "sequential", "dense"])
@pytest.mark.parametrize("attention", [None, ATTENTION], ids=str)
def test_the_recorded_perplexity_is_that_of_the_loaded_artifact(
    checkpoint: Checkpoint,
    tokens: Tensor,
    base: BuildConfig,
    tmp_path: Path,
    attention: ActivationScheme | None,
    inputs: Literal["quantized", "sequential", "dense"],
) -> None:
    config = replace(base, attention=attention, calibration=replace(base.calibration, inputs=inputs))
    report = build_artifact(checkpoint, tmp_path / "a", config)
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference")
    assert loaded.model.config.attention == loaded.manifest.build.attention == attention
    assert report.quantized_perplexity == pytest.approx(served_perplexity(loaded.model, tokens), rel=1e-4)
    evaluated = load_for_evaluation(str(tmp_path / "a"), "cpu", "float32", RunOptions("reference")).model
    assert served_perplexity(evaluated, tokens) == served_perplexity(loaded.model, tokens)


def test_only_the_quantized_network_has_its_attention_quantized(
    checkpoint: Checkpoint, tokens: Tensor, base: BuildConfig, tmp_path: Path
) -> None:
    """With dense inputs the weights do not depend on it: switched off after loading, it leaves the plain build."""
    plain = build_artifact(checkpoint, tmp_path / "plain", base)
    report = build_artifact(checkpoint, tmp_path / "a", replace(base, attention=ATTENTION))
    assert report.dense_perplexity == plain.dense_perplexity
    assert report.quantized_perplexity is not None
    assert plain.quantized_perplexity is not None
    assert abs(report.quantized_perplexity - plain.quantized_perplexity) > 0.1
    names = {name for name in digests(tmp_path / "plain") if name.endswith(".safetensors")}
    shards = [{name: digests(tmp_path / it)[name] for name in names} for it in ("plain", "a")]
    assert shards[0] == shards[1]
    model = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference").model
    for module in model.modules():
        if isinstance(module, Attention):
            module.quantize = None
    assert served_perplexity(model, tokens) == pytest.approx(plain.quantized_perplexity, rel=1e-4)


def test_later_layers_are_calibrated_behind_quantized_attention(
    checkpoint: Checkpoint, base: BuildConfig, tmp_path: Path
) -> None:
    config = replace(base, calibration=replace(base.calibration, inputs="quantized"))
    errors: list[dict[str, float | None]] = []
    for name, attention in (("plain", None), ("a", ATTENTION)):
        build_artifact(checkpoint, tmp_path / name, replace(config, attention=attention))
        linears = load_artifact(tmp_path / name).manifest.linears
        errors.append({path: record.relative_output_error for path, record in linears.items()})
    assert {path for path in errors[0] if errors[0][path] != errors[1][path]} == {
        path for path in errors[0] if path.startswith("model.layers.1.")
    }


def test_clipped_activations_are_built_and_served_alike(
    checkpoint: Checkpoint, tokens: Tensor, base: BuildConfig, tmp_path: Path
) -> None:
    perplexities = []
    for ratio in (1.0, 0.8):
        scheme, out = ActivationScheme(4, 32, clip_ratio=ratio), tmp_path / f"{ratio}"
        report = build_artifact(checkpoint, out, replace(base, activations=scheme))
        loaded = load_artifact(out, dtype=torch.float32, backend="reference")
        assert {record.activations for record in loaded.manifest.linears.values()} == {scheme}
        assert report.quantized_perplexity == pytest.approx(served_perplexity(loaded.model, tokens), rel=1e-4)
        perplexities.append(report.quantized_perplexity)
    assert perplexities[0] != perplexities[1]


def test_artifacts_from_before_these_settings_still_load(
    checkpoint: Checkpoint, tokens: Tensor, base: BuildConfig, tmp_path: Path
) -> None:
    build_artifact(checkpoint, tmp_path / "a", replace(base, activations=ActivationScheme(8)))
    model = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference").model

    def age(values: dict[str, Any]) -> None:
        del values["build"]["attention"], values["build"]["activations"]["clip_ratio"]
        for record in values["linears"].values():
            del record["activations"]["clip_ratio"]

    sign_again(tmp_path / "a", age)
    old = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference")
    assert old.manifest.build.attention is None
    assert old.manifest.build.activations == ActivationScheme(8)
    assert served_perplexity(old.model, tokens) == served_perplexity(model, tokens)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (ActivationScheme(4, 64), r"^attention: group_size 64 .* 32 channels of the keys and values .*\[-1, 32\]"),
        (ActivationScheme(4, 32, format="mxfp4"), None),
    ],
)
def test_attention_groups_are_checked_before_any_weight_is_read(
    base: BuildConfig, scheme: ActivationScheme, message: str | None
) -> None:
    network, config = LlamaConfig.from_hf(VALUES, "config.json"), replace(base, attention=scheme)
    if message is None:
        check_build(config, network)
    else:
        with pytest.raises(SchemeError, match=message):
            check_build(config, network)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(make_cli(), [str(it) for it in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_line_builds_and_shows_both(tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "tiny", VALUES), tmp_path / "a"
    run(
        "build", checkpoint, "--out", out, "--method", "lqer", "--rank", 2, "--group-size", 32, "--calibration", "none",
        "--act-bits", 4, "--act-clip-ratio", 0.9, "--attention-bits", 5, "--attention-group-size", 32,
        "--attention-symmetric",
    )  # fmt: skip
    build = json.loads((out / "quantization.json").read_text(encoding="utf-8"))["build"]
    assert BuildConfig.from_dict(build).activations == ActivationScheme(4, clip_ratio=0.9)
    assert BuildConfig.from_dict(build).attention == ActivationScheme(5, 32, is_symmetric=True)
    shown = " ".join(run("inspect", out).replace("│", " ").split())
    assert "activations INT4 asymmetric, per token, clip ratio 0.9" in shown
    assert "attention inputs INT5 symmetric, group 32" in shown
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "A INT4 per token clip 0.9, QKV INT5 sym g32" in report
