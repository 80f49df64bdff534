"""Builds that train: what is learnt is merged, and what is served is what was trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.build import build_artifact
from models.build import end_to_end as end_to_end_phase
from models.build.plan import check_build
from models.build.recipe import training_method
from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    QuantizerConfig,
    ReconstructConfig,
    TrainingConfig,
    TransformConfig,
)
from models.errors import SchemeError
from models.llama.batch import Batch
from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.llama.model import LlamaForCausalLM
from models.scheme import ActivationScheme, QuantScheme, VocabularyScheme
from tests.support.builds import digests, write_tokens
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES, NUM_LAYERS = 16, 16, 2
FIRST_LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    values = tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_LAYERS)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, random_tensors(values))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three bits per channel, four-bit activations, one sequence a step: an error that training can lower."""
    count = NUM_SEQUENCES * LENGTH
    path = write_tokens(tmp_path_factory.mktemp("tokens"), count)
    return BuildConfig(
        scheme=QuantScheme(num_bits=3, group_size=-1),
        activations=ActivationScheme(num_bits=4, group_size=32),
        reconstruct=ReconstructConfig(method="qer", rank=4),
        calibration=CalibrationConfig(
            source=str(path), num_sequences=NUM_SEQUENCES, sequence_length=LENGTH, batch_size=1, num_holdout=0
        ),
        training=TrainingConfig(num_epochs=4, num_check_batches=NUM_SEQUENCES, num_checks=2, scale_learning_rate=5e-3),
    )  # fmt: skip


@pytest.fixture
def build(checkpoint_dir, tmp_path):
    def run(config, name="a", **options):
        return build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / name, config, **options)

    return run


@torch.no_grad()
def output_error(checkpoint_dir, path, config):
    """Relative squared error of the last hidden states over the calibration set, as the artifact is served."""
    tokens = torch.tensor(json.loads(Path(config.calibration.source).read_text(encoding="utf-8"))).view(-1, LENGTH)
    batch, checkpoint = Batch.uncached(tokens, torch.device("cpu")), open_checkpoint(str(checkpoint_dir))
    dense = LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint, torch.float32, torch.device("cpu")))(batch)
    served = load_artifact(path, dtype=torch.float32, backend="reference").model(batch)
    return float((served - dense).square().sum() / dense.square().sum())


MERGES = ["fixed-point", "shift", "direct", "ternary", "inside-rounding", "requantize", "none"]


@pytest.mark.parametrize("merge", MERGES)
def test_whatever_was_trained_ships_as_a_plain_integer_layer(merge, build, base, tmp_path):
    build(replace(base, reconstruct=ReconstructConfig("qer", 4, options={"merge": merge})))
    with ArtifactReader.open(tmp_path / "a") as artifact:
        for path, record in artifact.manifest.linears.items():
            weights = artifact.linear(path)
            assert (record.rank, weights.correction) == (0, None)
            assert record.effective_bits == record.scheme.weight_bits(record.in_features)
            assert int(weights.quantized.codes.max()) < 8


@pytest.mark.parametrize("merge", ["fixed-point", "none"])
def test_training_lowers_the_error_of_what_is_served(merge, build, base, checkpoint_dir, tmp_path):
    untrained = replace(base, reconstruct=ReconstructConfig("none", 0))
    build(untrained, "untrained")
    build(replace(base, reconstruct=ReconstructConfig("qer", 4, options={"merge": merge})), "trained")
    before, after = (output_error(checkpoint_dir, tmp_path / it, base) for it in ("untrained", "trained"))
    assert after < 0.98 * before


def test_blocks_can_be_trained_together(build, base, checkpoint_dir, tmp_path):
    build(replace(base, reconstruct=ReconstructConfig("none", 0)), "untrained")
    together = replace(base, training=replace(base.training, num_blocks=2, use_checkpointing=True))
    build(together, "trained")
    before, after = (output_error(checkpoint_dir, tmp_path / it, base) for it in ("untrained", "trained"))
    assert after < before


def test_equal_builds_train_equally_and_an_interrupted_one_goes_on_to_the_same_bytes(
    build, base, tmp_path, monkeypatch
):
    build(base, "whole")

    class Interrupted(Exception):
        pass

    class Impatient:
        def phase(self, name, total):
            pass

        def progress(self, done, note=""):
            if note:
                raise Interrupted

    with pytest.raises(Interrupted):
        build(base, "resumed", observer=Impatient())
    report = build(base, "resumed")
    assert report.num_resumed_layers >= 1
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_activations_keep_the_clip_ratio_that_was_learnt(build, base, tmp_path):
    build(replace(base, training=replace(base.training, clip_learning_rate=0.05)))
    with ArtifactReader.open(tmp_path / "a") as artifact:
        ratios = {path: artifact.linear(path).activations.clip_ratio for path in artifact.manifest.linears}
    assert any(ratio < 1 for ratio in ratios.values())
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        assert len({ratios[f"{prefix}.{name}"] for name in ("q_proj", "k_proj", "v_proj")}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"transform": TransformConfig(rotation="online", rotation_block=32)},
        {"transform": TransformConfig(flatten=1.0)},
        {"objective": "output"},
        {"attention": ActivationScheme(num_bits=4, group_size=-1)},
        {"reconstruct": ReconstructConfig("qer", 4, options={"initialization": "qera"})},
        {"calibration": "sequential"},
    ],
    ids=str,
)
def test_training_goes_with_everything_else(change, build, base, checkpoint_dir, tmp_path):
    if change.get("calibration") == "sequential":
        change = {"calibration": replace(base.calibration, inputs="sequential")}
    config = replace(base, **change)
    build(config)
    build(replace(config, reconstruct=ReconstructConfig("none", 0)), "untrained")
    before, after = (output_error(checkpoint_dir, tmp_path / it, base) for it in ("untrained", "a"))
    assert after < before


def test_a_budget_chooses_the_widths_and_training_keeps_its_rank(build, base, tmp_path):
    build(replace(base, budget=BudgetConfig(target_bits=4.0)))
    with ArtifactReader.open(tmp_path / "a") as artifact:
        assert len({record.scheme.num_bits for record in artifact.manifest.linears.values()}) > 1
        assert artifact.manifest.effective_bits <= 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": {"inputs": "dense"}}, "quantized layers give"),
        ({"calibration": {"source": "none"}}, "mean_square"),
        ({"scheme": {"format": "nf4", "num_bits": 4, "group_size": 32}}, "int"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_weight_is_read(change, message, base, checkpoint_dir):
    values = base.to_dict()
    for section, own in change.items():
        values[section] |= own
    with pytest.raises(SchemeError, match=message):
        check_build(BuildConfig.from_dict(values), open_checkpoint(str(checkpoint_dir)).config)


VOCABULARIES = pytest.mark.parametrize(
    "vocabulary", [pytest.param(VocabularyScheme(), marks=pytest.mark.slow), VocabularyScheme(4, 8)], ids=str
)


def end_to_end(base, vocabulary):
    training = replace(base.training, end_to_end_epochs=2, end_to_end_learning_rate=2e-3)
    calibration = replace(base.calibration, num_sequences=12, num_holdout=4)
    return replace(base, training=training, calibration=calibration, vocabulary=vocabulary)


@VOCABULARIES
def test_the_end_to_end_phase_changes_scales_alone_and_what_is_recorded_is_what_is_served(
    build, base, tmp_path, vocabulary
):
    config = end_to_end(base, vocabulary)
    build(replace(config, training=replace(config.training, end_to_end_epochs=0)), "blocks")
    report = build(config, "whole")
    with ArtifactReader.open(tmp_path / "blocks") as before, ArtifactReader.open(tmp_path / "whole") as after:
        for path in after.manifest.linears:
            old, new = before.linear(path).quantized, after.linear(path).quantized
            assert torch.equal(old.codes, new.codes)
            assert torch.equal(old.zero_point, new.zero_point)
        assert any(
            not torch.equal(before.linear(path).quantized.scale, after.linear(path).quantized.scale)
            for path in after.manifest.linears
        )
    tokens = torch.tensor(json.loads(Path(config.calibration.source).read_text(encoding="utf-8"))).view(-1, LENGTH)
    served = load_artifact(tmp_path / "whole", dtype=torch.float32, backend="reference").model
    batch = Batch.uncached(tokens[12:16], torch.device("cpu"))
    with torch.no_grad():
        logits = served.logits(served(batch)).view(4, LENGTH, -1)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[12:16, 1:].flatten())
    assert report.quantized_perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


@VOCABULARIES
def test_a_build_interrupted_while_scales_are_applied_goes_on_to_the_same_bytes(
    build, base, tmp_path, monkeypatch, vocabulary
):
    config = end_to_end(base, vocabulary)
    build(config, "whole")
    real, calls = end_to_end_phase.write_layer, []

    def fails_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(end_to_end_phase, "write_layer", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(config, "resumed")
    monkeypatch.setattr(end_to_end_phase, "write_layer", real)
    monkeypatch.setattr(end_to_end_phase._Phase, "train", None)
    build(config, "resumed")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("quantizer", "options", "merge"),
    [
        ("rtn", {}, "fixed-point"),
        ("rtn", {"shift": 5}, "fixed-point"),
        ("gptq", {}, "none"),
        ("gptq", {"merge": "shift"}, "shift"),
    ],
)
def test_the_merge_that_is_not_named_is_what_suits_the_base(base, quantizer, options, merge):
    config = replace(base, quantizer=QuantizerConfig(quantizer), reconstruct=replace(base.reconstruct, options=options))
    method = training_method(config)
    assert method is not None
    assert method.options.merge == merge


def test_on_gptq_the_codes_are_those_of_gptq_and_the_scales_are_trained(base, build, checkpoint_dir, tmp_path):
    config = replace(base, quantizer=QuantizerConfig("gptq"))
    build(config, "trained")
    build(replace(config, reconstruct=ReconstructConfig("none", rank=0)), "plain")
    with ArtifactReader.open(tmp_path / "trained") as trained, ArtifactReader.open(tmp_path / "plain") as plain:
        ours, theirs = (artifact.linear(FIRST_LINEAR).quantized for artifact in (trained, plain))
        assert torch.equal(ours.codes, theirs.codes)
        assert not torch.equal(ours.scale, theirs.scale)
    assert output_error(checkpoint_dir, tmp_path / "trained", config) < output_error(
        checkpoint_dir, tmp_path / "plain", config
    )
