"""Builds with everything that goes beyond plain codes and a correction: transforms, objectives, orders, budgets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.build import build_artifact
from models.calibration.store import StatisticsStore
from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    LayerConfig,
    QuantizerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.llama.batch import Batch
from models.llama.checkpoint import open_checkpoint
from models.quant.activation import quantize_activations
from models.reconstruct import RECONSTRUCTORS
from models.reconstruct.loss import effective_weight
from models.scheme import ActivationScheme, QuantScheme
from tests.support.builds import dense_model, digests, inputs_of, write_tokens
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES, NUM_HOLDOUT = 24, 12, 2


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    values = tiny_config(hidden_size=64, intermediate_size=96)
    tensors = random_tensors(values)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].bfloat16().float()
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, tensors)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration to vary: 4 bits in groups of 32, no correction, calibrated on seeded tokens."""
    count = (NUM_SEQUENCES + NUM_HOLDOUT) * LENGTH
    path = write_tokens(tmp_path_factory.mktemp("tokens"), count)
    return BuildConfig(
        scheme=QuantScheme(num_bits=4, group_size=32),
        reconstruct=ReconstructConfig(method="none"),
        calibration=CalibrationConfig(
            source=str(path), num_sequences=NUM_SEQUENCES, sequence_length=LENGTH, batch_size=4,
            num_holdout=NUM_HOLDOUT, inputs="dense",
        ),
    )  # fmt: skip


@pytest.fixture
def build(checkpoint_dir, tmp_path):
    def run(config, name="a", **options):
        return build_artifact(open_checkpoint(str(checkpoint_dir)), tmp_path / name, config, **options)

    return run


def calibration_tokens(config):
    tokens = json.loads(Path(config.calibration.source).read_text(encoding="utf-8"))
    return torch.tensor(tokens).view(-1, LENGTH)[:NUM_SEQUENCES]


TRANSFORMS = {
    "online": TransformConfig(rotation="online"),
    "online blocks": TransformConfig(rotation="online", rotation_block=16),
    "offline": TransformConfig(rotation="offline"),
    "flatten": TransformConfig(flatten=1.0),
    "flatten half, permute": TransformConfig(flatten=0.5, permute=True),
    "permute, online": TransformConfig(permute=True, rotation="online", rotation_block=32),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_network_computes_what_the_dense_one_does(build, checkpoint_dir, base, tmp_path, name):
    config = replace(base, scheme=QuantScheme(num_bits=8, group_size=32), transform=TRANSFORMS[name])
    report = build(config)
    plain = build(replace(config, transform=TransformConfig()), "plain")
    assert report.dense_perplexity == pytest.approx(plain.dense_perplexity, rel=1e-3)
    tokens = calibration_tokens(config)[:2]
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32, backend="reference")
    with torch.no_grad():
        expected = dense_model(checkpoint_dir)(tokens).logits.flatten(0, 1)
        ours = loaded.model.logits(loaded.model(Batch.uncached(tokens, loaded.model.device)))
    assert float((ours - expected).norm() / expected.norm()) < 0.02


def test_codes_belong_to_the_rotated_weight(build, checkpoint_dir, base, tmp_path):
    """Undoing the rotation of the stored weight gives the dense one back, up to what 8 bits cost."""
    config = replace(base, scheme=QuantScheme(8, 32), transform=TransformConfig(rotation="online", rotation_block=32))
    build(config)
    dense = dense_model(checkpoint_dir)
    with ArtifactReader.open(tmp_path / "a") as reader:
        for path in reader.config.linear_shapes():
            weights = reader.linear(path)
            assert weights.rotation_block == 32
            expected = dense.get_submodule(path).weight.detach().double()
            assert float((effective_weight(weights) - expected).norm() / expected.norm()) < 0.01


def output_loss(dense, weights, inputs, target_weight, activations):
    """Mean over tokens of ``|x W^T - q(x) Q^T|^2``."""
    quantized = quantize_activations(inputs, activations).double()
    return float((inputs.double() @ target_weight.double().T - quantized @ effective_weight(weights).T).square().mean())


@pytest.mark.parametrize("change", ["objective", "refit"])
@pytest.mark.parametrize("path", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"])
def test_aiming_at_outputs_loses_less_of_them(build, checkpoint_dir, base, tmp_path, change, path):
    """With quantized activations; measured with transformers' inputs and an explicit product."""
    activations = ActivationScheme(num_bits=3, group_size=32)
    correction = ReconstructConfig(method="qera-exact", rank=8, factor_dtype="float32")
    plain = replace(base, activations=activations, reconstruct=correction, quantizer=QuantizerConfig("gptq"))
    aimed = replace(plain, objective="output")
    if change == "refit":
        aimed = replace(plain, reconstruct=replace(correction, refit=True))
    dense = dense_model(checkpoint_dir)
    inputs = inputs_of(dense, path, calibration_tokens(base))
    losses = []
    for name, config in (("plain", plain), ("aimed", aimed)):
        build(config, name)
        with ArtifactReader.open(tmp_path / name) as reader:
            weight = dense.get_submodule(path).weight.detach()
            losses.append(output_loss(dense, reader.linear(path), inputs, weight, activations))
    assert losses[1] < losses[0]


def test_sequential_inputs_come_from_the_quantized_part_of_the_same_layer(build, checkpoint_dir, base, tmp_path):
    build(replace(base, calibration=replace(base.calibration, inputs="sequential"), scheme=QuantScheme(3, 32)))
    model, path = dense_model(checkpoint_dir), "model.layers.0.self_attn.o_proj"
    dense = model.get_submodule(path).weight.detach().double()
    with ArtifactReader.open(tmp_path / "a") as reader:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = f"model.layers.0.self_attn.{name}"
            model.get_submodule(linear).weight.data = effective_weight(reader.linear(linear)).float()
        error = dense - effective_weight(reader.linear(path))
        recorded = reader.manifest.linears[path].relative_output_error
    x = inputs_of(model, path, calibration_tokens(base)).double()
    expected = ((x @ error.T).square().sum() / (x @ dense.T).square().sum()).sqrt()
    assert recorded == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", RECONSTRUCTORS)
def test_every_method_builds_loads_and_runs(build, base, tmp_path, method):
    correction = ReconstructConfig(method=method, rank=8, factor_dtype="bfloat16")
    inputs = "quantized" if method == "qer" else "dense"
    calibration = replace(base.calibration, inputs=inputs)
    report = build(replace(base, reconstruct=correction, quantizer=QuantizerConfig("gptq"), calibration=calibration))
    loaded = load_artifact(tmp_path / "a", dtype=torch.float32)
    tokens = torch.arange(10)[None]
    assert bool(loaded.model(Batch.uncached(tokens, loaded.model.device)).isfinite().all())
    assert loaded.manifest.effective_bits == report.effective_bits
    ranks = {record.rank for record in loaded.manifest.linears.values()}
    assert ranks == ({0} if method in ("none", "rtn", "qer") else {8})


def test_serq_reads_the_channels_that_flattening_had_to_shrink_most(build, base, tmp_path):
    correction = ReconstructConfig(method="serq", rank=32, factor_dtype="int4")
    transform = TransformConfig(flatten=1.0, permute=True)
    build(replace(base, reconstruct=correction, transform=transform))
    with ArtifactReader.open(tmp_path / "a") as reader:
        for path in reader.config.linear_shapes():
            weights = reader.linear(path)
            assert weights.correction.lora_down is None
            assert weights.correction.rank == 32
            # the permutation of the MLP's hidden channels is folded, the others are gathered
            assert (weights.channel_order is None) == path.endswith("down_proj")


def test_builds_from_a_store_are_those_without_it(build, base, tmp_path):
    config = replace(base, quantizer=QuantizerConfig("gptq"), reconstruct=ReconstructConfig("qera-exact", 8))
    build(config, "without")
    store = StatisticsStore(tmp_path / "store", "f")
    build(config, "filling", statistics=store)
    build(config, "reading", statistics=store)
    assert (store.num_saved, store.num_loaded) == (2, 2)
    assert digests(tmp_path / "without") == digests(tmp_path / "filling") == digests(tmp_path / "reading")


def test_exceptions_hold_for_the_layers_that_they_name(build, base, tmp_path):
    path = "model.layers.1.mlp.up_proj"
    layers = {path: LayerConfig(num_bits=6, group_size=-1, rank=0)}
    build(replace(base, reconstruct=ReconstructConfig("qera-approx", 4), layers=layers))
    records = load_artifact(tmp_path / "a").manifest.linears
    assert (records[path].scheme.num_bits, records[path].scheme.group_size, records[path].rank) == (6, -1, 0)
    assert all((it.scheme.num_bits, it.rank) == (4, 4) for name, it in records.items() if name != path)


@pytest.mark.parametrize("target_bits", [3.6, 4.5, 6.0])
def test_a_budget_is_kept_and_used(build, base, target_bits):
    config = replace(
        base,
        reconstruct=ReconstructConfig("qera-exact", 0, "int8"),
        budget=BudgetConfig(target_bits=target_bits, max_rank=8),
    )
    report = build(config)
    assert target_bits - 0.35 <= report.effective_bits <= target_bits


def test_without_any_correlation_gptq_rounds_to_nearest_and_qera_exact_is_the_approximate_one(build, base, tmp_path):
    shrunk = replace(base, calibration=replace(base.calibration, shrinkage=1.0))
    build(replace(shrunk, quantizer=QuantizerConfig("gptq")), "gptq")
    build(base, "rtn")
    build(replace(shrunk, reconstruct=ReconstructConfig("qera-exact", 8)), "exact")
    build(replace(base, reconstruct=ReconstructConfig("qera-approx", 8)), "approx")
    readers = {name: ArtifactReader.open(tmp_path / name) for name in ("gptq", "rtn", "exact", "approx")}
    for path in readers["gptq"].manifest.linears:
        codes = [readers[name].linear(path).quantized.codes for name in ("gptq", "rtn")]
        assert torch.equal(*codes)
        exact, approx = (effective_weight(readers[name].linear(path)) for name in ("exact", "approx"))
        assert torch.allclose(exact, approx, atol=1e-2 * float(exact.abs().max()))
    # errors are measured with the inputs as they were
    errors = [
        [record.relative_output_error for record in readers[name].manifest.linears.values()] for name in ("gptq", "rtn")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    for reader in readers.values():
        reader.close()
