"""The build pipeline on a tiny checkpoint, against transformers and the textbook formulas."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.build import SilentObserver, build_artifact
from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    LayerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.errors import ArtifactError, CalibrationError, SchemeError
from models.evaluate.perplexity import score_window, summarize
from models.llama.checkpoint import open_checkpoint
from models.quant.grid import dequantize
from models.reconstruct.loss import effective_weight
from models.scheme import ActivationScheme, QuantScheme
from tests.support.builds import dense_model, digests, inputs_of, write_tokens
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES, NUM_HOLDOUT = 24, 6, 2


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    """Three layers whose embedding bfloat16 holds exactly, so that storing it loses nothing."""
    values = tiny_config(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    tensors = random_tensors(values)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].bfloat16().float()
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, tensors)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    count = (NUM_SEQUENCES + NUM_HOLDOUT) * LENGTH
    return write_tokens(tmp_path_factory.mktemp("tokens"), count)


def build_config(token_file, method="qera-exact", rank=8, inputs="quantized", num_bits=3):
    return BuildConfig(
        scheme=QuantScheme(num_bits=num_bits, group_size=32),
        reconstruct=ReconstructConfig(method=method, rank=rank, factor_dtype="float32"),
        calibration=CalibrationConfig(
            source=str(token_file),
            num_sequences=NUM_SEQUENCES,
            sequence_length=LENGTH,
            batch_size=4,
            num_holdout=NUM_HOLDOUT,
            inputs=inputs,
        ),
    )


def sequences(token_file):
    tokens = torch.tensor(json.loads(token_file.read_text(encoding="utf-8"))).view(-1, LENGTH)
    return tokens[:NUM_SEQUENCES], tokens[NUM_SEQUENCES:]


def textbook_correction(error, inputs, rank):
    """``S^-1 SVD_k(S E)`` with the symmetric root S of the autocorrelation (QERA, theorem 1), in numpy."""
    autocorrelation = (inputs.T @ inputs / len(inputs)).numpy()
    values, vectors = np.linalg.eigh(autocorrelation)
    root = (vectors * np.sqrt(values)) @ vectors.T
    u, sigma, vt = np.linalg.svd(root @ error.T.numpy(), full_matrices=False)
    return torch.from_numpy((np.linalg.solve(root, u[:, :rank]) * sigma[:rank]) @ vt[:rank]).T


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"])
def test_the_first_layer_is_corrected_as_the_theorem_says(checkpoint_dir, token_file, tmp_path, path):
    build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "a", build_config(token_file))
    model = dense_model(checkpoint_dir)
    with ArtifactReader.open(tmp_path / "a") as reader:
        weights = reader.linear(path)
    error = model.get_submodule(path).weight.detach().double() - dequantize(weights.quantized).double()
    expected = textbook_correction(error, inputs_of(model, path, sequences(token_file)[0]), rank=8)
    ours = weights.correction.lora_up.double() @ weights.correction.lora_down.double()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inputs", ["quantized", "dense"])
def test_later_layers_see_the_inputs_that_were_asked_for(checkpoint_dir, token_file, tmp_path, inputs):
    build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "a", build_config(token_file, inputs=inputs))
    dense, model = dense_model(checkpoint_dir), dense_model(checkpoint_dir)
    path = "model.layers.2.mlp.up_proj"
    with ArtifactReader.open(tmp_path / "a") as reader:
        for name in reader.config.linear_shapes():
            if inputs == "quantized" and not name.startswith("model.layers.2."):
                model.get_submodule(name).weight.data = effective_weight(reader.linear(name)).float()
        error = dense.get_submodule(path).weight.double() - effective_weight(reader.linear(path))
        recorded = reader.manifest.linears[path].relative_output_error
    x = inputs_of(model, path, sequences(token_file)[0])
    expected = ((x @ error.T).square().sum() / (x @ dense.get_submodule(path).weight.double().T).square().sum()).sqrt()
    assert recorded == pytest.approx(expected.item(), rel=1e-3)


def test_recorded_perplexities_are_those_of_transformers_and_of_the_loaded_artifact(
    checkpoint_dir, token_file, tmp_path
):
    report = build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "a", build_config(token_file))
    holdout = sequences(token_file)[1]
    with torch.no_grad():
        logits = dense_model(checkpoint_dir)(holdout).logits[:, :-1].flatten(0, 1)
    dense = torch.nn.functional.cross_entropy(logits, holdout[:, 1:].flatten()).exp().item()
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference")
    quantized = summarize([score_window(loaded.model, row, LENGTH - 1) for row in holdout])
    assert report.dense_perplexity == pytest.approx(dense, rel=1e-4)
    assert report.quantized_perplexity == pytest.approx(quantized.perplexity, rel=1e-4)
    assert loaded.manifest.evaluation["num_tokens"] == quantized.num_tokens
    probe = loaded.manifest.probe
    assert list(probe.token_ids) == holdout[0].tolist()
    first = torch.nn.functional.cross_entropy(logits[: LENGTH - 1], holdout[0, 1:]).item()
    assert probe.dense_nll == pytest.approx(first, rel=1e-4)
    assert probe.quantized_nll == pytest.approx(
        score_window(loaded.model, holdout[0], LENGTH - 1).mean().item(), rel=1e-4
    )


def test_two_builds_are_byte_identical_wherever_the_calibration_file_lies(checkpoint_dir, token_file, tmp_path):
    moved = tmp_path / "elsewhere" / token_file.name
    moved.parent.mkdir()
    moved.write_bytes(token_file.read_bytes())
    for name, source in (("a", token_file), ("b", moved)):
        build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / name, build_config(source))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert str(token_file.parent).encode() not in (tmp_path / "a" / "quantization.json").read_bytes()


class Interrupted(Exception):
    """Stands for Ctrl-C, or for a machine that is switched off."""


class InterruptingObserver(SilentObserver):
    def __init__(self, after):
        self.after = after

    def progress(self, done, note=""):
        if done == self.after:
            raise Interrupted


@pytest.mark.parametrize("inputs", ["quantized", "dense"])
def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(checkpoint_dir, token_file, tmp_path, inputs):
    checkpoint, config = open_checkpoint(str(checkpoint_dir)), build_config(token_file, inputs=inputs)
    build_artifact(checkpoint, tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        build_artifact(checkpoint, tmp_path / "resumed", config, observer=InterruptingObserver(2))
    assert not (tmp_path / "resumed").exists()
    report = build_artifact(checkpoint, tmp_path / "resumed", config)
    assert report.num_resumed_layers == 2
    assert digests(tmp_path / "whole") == digests(tmp_path / "resumed")


class TrackingCheckpoint:
    """Passes a checkpoint on and watches which of its matrices are alive at the same time."""

    def __init__(self, checkpoint):
        self._checkpoint = checkpoint
        self._alive = []
        self.seen_together = set()

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def tensor(self, name, narrow=False):
        tensor = self._checkpoint.tensor(name, narrow).clone()
        if tensor.dim() == 1:
            return tensor
        owner = name.split(".")[2] if "layers" in name else "embedding"
        self._alive.append((owner, weakref.ref(tensor.untyped_storage())))
        gc.collect()
        self._alive = [(owner, storage) for owner, storage in self._alive if storage() is not None]
        self.seen_together.add(tuple(sorted({owner for owner, _ in self._alive})))
        return tensor


def test_no_more_than_one_dense_layer_is_held_and_not_beside_the_embedding(checkpoint_dir, token_file, tmp_path):
    checkpoint = TrackingCheckpoint(open_checkpoint(str(checkpoint_dir)))
    build_artifact(checkpoint, tmp_path / "a", build_config(token_file))
    assert checkpoint.seen_together == {("embedding",), ("0",), ("1",), ("2",)}


def test_self_written_calibration_is_reproducible_and_needs_no_data(checkpoint_dir, tmp_path):
    calibration = CalibrationConfig(num_sequences=3, sequence_length=16, num_holdout=1, seed=5)
    config = BuildConfig(
        scheme=QuantScheme(group_size=32), reconstruct=ReconstructConfig(rank=4), calibration=calibration
    )
    for name in ("a", "b"):
        build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / name, config)
    other = replace(config, calibration=replace(calibration, seed=6))
    build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "c", other)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    fingerprints = [load_artifact(tmp_path / name).manifest.calibration_fingerprint for name in ("a", "c")]
    assert fingerprints[0] != fingerprints[1]


def test_a_method_without_statistics_builds_without_calibration(checkpoint_dir, tmp_path):
    config = BuildConfig(
        scheme=QuantScheme(group_size=32),
        reconstruct=ReconstructConfig(method="lqer", rank=4),
        calibration=CalibrationConfig(source="none"),
    )
    report = build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / "a", config)
    manifest = load_artifact(tmp_path / "a").manifest
    assert report.dense_perplexity is None
    assert manifest.probe is None
    assert manifest.calibration_fingerprint is None
    assert all(record.relative_output_error is None for record in manifest.linears.values())


class Untouchable:
    """A checkpoint whose weights must not be read."""

    def __init__(self, config):
        self.config = config
        self.fingerprint = "0" * 64

    def tensor(self, name, narrow=False):
        raise AssertionError(f"{name} was read")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BuildConfig(scheme=QuantScheme(group_size=128)), r"layers\.0\.self_attn\.q_proj.*group_size 128.*64"),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), reconstruct=ReconstructConfig(rank=33)),
            r"layers\.0\.self_attn\.k_proj.*rank 33.*at most 32",
        ),
        (BuildConfig(reconstruct=ReconstructConfig(method="magic")), r"'magic'.*qera-exact"),
        (
            BuildConfig(
                scheme=QuantScheme(group_size=32), transform=TransformConfig(rotation="online", rotation_block=64)
            ),
            r"layers\.0\.mlp\.down_proj.*rotation_block 64 does not divide 96.*32",
        ),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), activations=ActivationScheme(group_size=64)),
            r"layers\.0\.mlp\.down_proj: activation group_size 64.*96",
        ),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), layers={"lm_head": LayerConfig(rank=0)}),
            r"'lm_head' is not a linear layer.*model\.layers\.0\.self_attn\.q_proj",
        ),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), budget=BudgetConfig(target_bits=1.5)),
            r"1\.5.*reach",
        ),
        (
            BuildConfig(
                scheme=QuantScheme(group_size=32),
                transform=TransformConfig(flatten=1.0),
                reconstruct=ReconstructConfig(method="none"),
                calibration=CalibrationConfig(source="none"),
            ),
            r"flatten.*--calibration",
        ),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), calibration=CalibrationConfig(source="none")),
            r"autocorrelation.*--calibration",
        ),
        (
            BuildConfig(scheme=QuantScheme(group_size=32), calibration=CalibrationConfig(sequence_length=4096)),
            r"4096 tokens exceed.*128",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_weight_is_read(checkpoint_dir, tmp_path, config, message):
    checkpoint = Untouchable(open_checkpoint(str(checkpoint_dir)).config)
    config = replace(config, reconstruct=replace(config.reconstruct, rank=min(config.reconstruct.rank, 33)))
    if "rank" not in message:
        config = replace(config, reconstruct=replace(config.reconstruct, rank=4))
    with pytest.raises(SchemeError, match=message):
        build_artifact(checkpoint, tmp_path / "a", config)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_replaced_unless_asked(checkpoint_dir, token_file, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="choose another name"):
            build_artifact(
                Untouchable(open_checkpoint(str(checkpoint_dir)).config),
                tmp_path / "a",
                build_config(token_file),
                overwrite=overwrite,
            )
    assert (tmp_path / "a" / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_weights_that_are_not_finite_name_the_layer(checkpoint_dir, token_file, tmp_path):
    values = json.loads((Path(checkpoint_dir) / "config.json").read_text(encoding="utf-8"))
    tensors = random_tensors(values)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = float("nan")
    broken = write_checkpoint(tmp_path / "broken", values, tensors)
    with pytest.raises(
        (SchemeError, CalibrationError), match=r"model\.layers\.1\.self_attn\.o_proj|model\.layers\.1\.mlp"
    ):
        build_artifact(open_checkpoint(str(broken)), tmp_path / "a", build_config(token_file))
