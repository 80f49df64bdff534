"""Plans on a tiny checkpoint, against the artifacts that are then built, and against measured losses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from models.artifact.load import load_artifact
from models.build import SilentObserver, build_artifact, predictor
from models.build.planning import plan_build
from models.build.predict import plan_layers
from models.build.predictor import split_runs
from models.calibration import gradients
from models.calibration.data import CalibrationTokens
from models.calibration.store import StatisticsStore
from models.cli_plan import plan as plan_verb
from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    LayerConfig,
    QuantizerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.errors import SchemeError
from models.llama.batch import Batch
from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.llama.model import LlamaForCausalLM
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.scheme import ActivationScheme, QuantScheme, VocabularyScheme
from tests.support.builds import write_tokens
from tests.support.tiny_checkpoints import VOCAB_SIZE, random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES = 24, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    values = tiny_config(num_hidden_layers=3, hidden_size=64, intermediate_size=96, attention_bias=True)
    tensors = random_tensors(values)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].bfloat16().float()
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, tensors)


@pytest.fixture
def checkpoint(directory):
    return open_checkpoint(str(directory))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    count = (NUM_SEQUENCES + 1) * LENGTH
    return write_tokens(tmp_path_factory.mktemp("tokens"), count)


@pytest.fixture
def config(token_file):
    calibration = CalibrationConfig(
        source=str(token_file), num_sequences=NUM_SEQUENCES, sequence_length=LENGTH, num_holdout=1
    )
    return BuildConfig(scheme=QuantScheme(4, 32), reconstruct=ReconstructConfig(rank=8), calibration=calibration)


RECIPES = {
    "qera-exact": {},
    "none, 3 bits, per row": {"scheme": QuantScheme(3, -1), "reconstruct": ReconstructConfig("none")},
    "symmetric, float32 factors": {
        "scheme": QuantScheme(5, 32, is_symmetric=True),
        "reconstruct": ReconstructConfig(rank=6, factor_dtype="float32"),
    },
    "mxint, 8-bit factors": {
        "scheme": QuantScheme(4, 32, format="mxint"),
        "reconstruct": ReconstructConfig(rank=8, factor_dtype="int8"),
    },
    "rotated": {"transform": TransformConfig(rotation="online", rotation_block=32)},
    "rotated offline": {"transform": TransformConfig(rotation="offline", rotation_block=32)},
    "gptq, flattened, quantized activations": {
        "quantizer": QuantizerConfig("gptq"),
        "transform": TransformConfig(flatten=0.5),
        "activations": ActivationScheme(8),
    },
    "serq": {"transform": TransformConfig(flatten=1.0), "reconstruct": ReconstructConfig("serq", rank=32)},
    "head of 4, embedding of 8 bits": {"vocabulary": VocabularyScheme(4, 8)},
    "one matrix of 8 bits, quantized activations": {
        "vocabulary": VocabularyScheme(8, 8),
        "activations": ActivationScheme(8),
    },
    "rotated offline, embedding of 8 bits": {
        "vocabulary": VocabularyScheme(16, 8),
        "transform": TransformConfig(rotation="offline", rotation_block=32),
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_and_memory_are_those_of_the_artifact_that_is_built(checkpoint, config, tmp_path, recipe):
    config = replace(config, **RECIPES[recipe])
    plan = plan_build(checkpoint, config)
    report = build_artifact(checkpoint, tmp_path / "artifact", config)
    loaded = load_artifact(tmp_path / "artifact")
    manifest = loaded.manifest
    assert plan.effective_bits == pytest.approx(manifest.effective_bits, rel=1e-9)
    stored = {name: size for name, size in manifest.component_bytes.items() if size}
    assert {name: size for name, size in plan.component_bytes.items() if size} == stored
    assert plan.artifact_bytes <= report.artifact_bytes
    assert plan.dense_bytes == report.dense_bytes
    assert plan.resident_bytes == pytest.approx(sum(loaded.resident_bytes.values()), rel=0.01)
    assert plan.build_memory_bytes == pytest.approx(report.memory_bound_bytes, rel=0.01)
    for path, layer in plan.linears.items():
        assert layer.effective_bits == pytest.approx(manifest.linears[path].effective_bits)


@pytest.mark.parametrize("target", [3.0, 4.0, 4.5, 6.0])
@pytest.mark.parametrize("use_gradients", [True, False])
def test_a_budget_is_kept_and_nearly_spent(checkpoint, config, target, use_gradients):
    plan = plan_build(checkpoint, replace(config, budget=BudgetConfig(target)), use_gradients=use_gradients)
    assert target - 0.05 < plan.effective_bits <= target + 1e-9
    assert (plan.nll_increase is None) != use_gradients
    assert (plan.output_error is None) == use_gradients


def test_more_bits_are_predicted_to_lose_less(checkpoint, config):
    targets = (2.7, 3.2, 4.1, 5.0, 7.0)
    losses = [plan_build(checkpoint, replace(config, budget=BudgetConfig(it))).nll_increase for it in targets]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[-1]


def test_a_budget_loses_less_than_the_uniform_scheme_of_its_size(checkpoint, config):
    uniform = plan_build(checkpoint, config)
    spent = plan_build(checkpoint, replace(config, budget=BudgetConfig(uniform.effective_bits)))
    assert spent.effective_bits <= uniform.effective_bits + 1e-9
    assert spent.nll_increase < uniform.nll_increase


def test_what_was_planned_is_what_is_built(checkpoint, config, tmp_path):
    budget = replace(config, budget=BudgetConfig(4.25))
    plan = plan_build(checkpoint, budget)
    build_artifact(checkpoint, tmp_path / "planned", budget)
    manifest = load_artifact(tmp_path / "planned").manifest
    assert manifest.effective_bits == pytest.approx(plan.effective_bits, rel=1e-9)
    for path, layer in plan.linears.items():
        record = manifest.linears[path]
        assert (record.scheme.num_bits, record.rank) == (layer.num_bits, layer.rank)


@pytest.mark.parametrize("use_gradients", [True, False])
def test_a_plan_from_a_store_is_the_plan_without_it(checkpoint, config, tmp_path, monkeypatch, use_gradients):
    config = replace(config, budget=BudgetConfig(4.25))
    sequences = torch.tensor(json.loads(Path(config.calibration.source).read_text())).view(-1, LENGTH)[:NUM_SEQUENCES]
    tokens = CalibrationTokens(sequences, sequences[:0])

    def planned(store):
        return plan_layers(checkpoint, tokens, config, CPU, SilentObserver(), use_gradients=use_gradients, store=store)

    plain, filling = planned(None), planned(StatisticsStore(tmp_path / "store", "these inputs"))
    monkeypatch.setattr(predictor, "collect_statistics", None)
    reused = planned(StatisticsStore(tmp_path / "store", "these inputs"))
    assert plain.linears == filling.linears == reused.linears
    assert plain.nll_increase == filling.nll_increase == reused.nll_increase


@pytest.mark.parametrize(
    ("count", "fitting", "judging"),
    [(0, [], []), (1, [0], [0]), (2, [0], [1]), (3, [0, 1], [2]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_no_batch_is_both_fitted_to_and_judged_by_but_a_single_one(count, fitting, judging):
    assert split_runs(list(range(count))) == (fitting, judging)


def test_with_few_tokens_what_gptq_fits_does_not_count_as_gained(checkpoint, config):
    """24 tokens say little of 96 channels: by themselves they would promise errors near zero."""
    config = replace(config, quantizer=QuantizerConfig("gptq", damping=1e-3), reconstruct=ReconstructConfig("none"))
    sequences = torch.tensor(json.loads(Path(config.calibration.source).read_text())).view(-1, LENGTH)[:2]

    def planned(batch_size):
        calibration = replace(config.calibration, batch_size=batch_size)
        tokens = CalibrationTokens(sequences, sequences[:0])
        return plan_layers(checkpoint, tokens, replace(config, calibration=calibration), CPU, SilentObserver())

    assert planned(batch_size=1).nll_increase > 2 * planned(batch_size=2).nll_increase


def test_exceptions_are_kept_and_the_rest_of_the_budget_goes_to_the_others(checkpoint, config):
    path, other = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    own = {path: LayerConfig(num_bits=8, rank=0), other: LayerConfig(group_size=64)}
    plan = plan_build(checkpoint, replace(config, budget=BudgetConfig(4.5), layers=own))
    assert (plan.linears[path].num_bits, plan.linears[path].rank) == (8, 0)
    assert plan.layers[other].group_size == plan.linears[other].group_size == 64
    assert 4.4 < plan.effective_bits <= 4.5


@pytest.mark.parametrize("only", ["", "q_proj", "v_proj", "up_proj", "down_proj"])
def test_on_text_of_its_own_the_predicted_loss_is_the_divergence_from_the_dense_network(
    checkpoint, config, only, monkeypatch
):
    """There the Fisher information is the Hessian, and ``1/2 e^T F e`` the divergence, up to independence assumptions.

    Errors are taken at a quarter of their size, where the second order is all there is, and counted sixteen times. All
    tokens count: this network has no attention sinks.
    """
    monkeypatch.setattr(gradients, "SINK_TOKENS", 0)
    model = LlamaForCausalLM(checkpoint.config, DenseWeights(checkpoint))
    sequences = sampled(model, 48)
    config = replace(
        config,
        reconstruct=ReconstructConfig("none"),
        calibration=replace(config.calibration, num_gradient_sequences=len(sequences)),
    )
    tokens = CalibrationTokens(sequences, sequences[:0])
    plan = plan_layers(checkpoint, tokens, config, CPU, SilentObserver())
    predicted = sum(layer.loss for path, layer in plan.linears.items() if path.endswith(only))
    dense = log_probabilities(model, sequences)
    for path in (path for path in plan.linears if path.endswith(only)):
        weight = model.get_parameter(f"{path}.weight".removeprefix("model.")).data
        weight += (dequantize(quantize_rtn(weight, config.scheme)) - weight) / 4
    divergence = (dense.exp() * (dense - log_probabilities(model, sequences))).sum(-1).mean().item()
    assert predicted == pytest.approx(16 * divergence, rel=0.4)


@torch.no_grad()
def log_probabilities(model, sequences):
    """(num_sequences, length - 1, vocab_size) float64."""
    logits = model.logits(model(Batch.uncached(sequences)))
    return logits.view(*sequences.shape, -1)[:, :-1].double().log_softmax(-1)


def sampled(model, num_sequences):
    """Text that the network itself writes, from a random first token."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(VOCAB_SIZE, (num_sequences, 1), generator=generator)
    while sequences.shape[1] < LENGTH:
        longer = torch.cat([sequences, sequences[:, :1]], 1)
        chosen = torch.multinomial(log_probabilities(model, longer)[:, -1].exp(), 1, generator=generator)
        sequences = torch.cat([sequences, chosen], 1)
    return sequences


def test_without_calibration_there_are_sizes_and_no_loss(checkpoint, config):
    none = replace(config, calibration=replace(config.calibration, source="none"))
    plan, full = plan_build(checkpoint, none), plan_build(checkpoint, config)
    assert plan.nll_increase is plan.output_error is plan.perplexity_ratio is None
    assert plan.component_bytes == full.component_bytes
    assert all(layer.loss is None for layer in plan.linears.values())


def test_a_budget_without_calibration_is_refused(checkpoint, config):
    none = replace(config, calibration=replace(config.calibration, source="none"), budget=BudgetConfig(4.0))
    with pytest.raises(SchemeError, match="calibration"):
        plan_build(checkpoint, none)
    empty = CalibrationTokens(*[torch.empty(0, LENGTH, dtype=torch.int64)] * 2)
    with pytest.raises(SchemeError, match="calibration"):
        plan_layers(checkpoint, empty, none, CPU, SilentObserver())


def test_a_target_out_of_reach_fails_before_any_weight_is_read(checkpoint, config, monkeypatch):
    def tensor(name, narrow=False):
        raise AssertionError(name)

    monkeypatch.setattr(checkpoint, "tensor", tensor)
    with pytest.raises(SchemeError, match="out of reach"):
        plan_build(checkpoint, replace(config, budget=BudgetConfig(1.5)))


def run(*arguments):
    cli = typer.Typer()
    cli.command()(plan_verb)
    return CliRunner().invoke(cli, [str(it) for it in arguments])


def options_of(config):
    calibration = config.calibration
    return ("--calibration", calibration.source, "--num-sequences", NUM_SEQUENCES, "--sequence-length", LENGTH,
            "--group-size", 32, "--num-holdout", 1)  # fmt: skip


def test_the_verb_prints_a_summary_and_a_table_of_choices(directory, config):
    result = run(directory, *options_of(config), "--target-bits", 4.5)
    assert result.exit_code == 0, result.output
    for text in ("target 4.5", "predicted perplexity", "down_proj", "100.0%", "per 1024 tokens"):
        assert text in result.output


def test_the_verb_prints_one_json_object(directory, config, checkpoint):
    result = run(directory, *options_of(config), "--rank", 8, "--json")
    values = json.loads(result.stdout)
    expected = plan_build(checkpoint, config)
    assert values["effective_bits"] == pytest.approx(expected.effective_bits)
    assert values["nll_increase"] == pytest.approx(expected.nll_increase)
    assert values["perplexity_ratio"] == pytest.approx(math.exp(expected.nll_increase))
    assert list(values["linears"]) == list(expected.linears)


def test_the_written_configuration_builds_the_plan_without_planning_again(directory, checkpoint, config, tmp_path):
    path = tmp_path / "plan.toml"
    result = run(directory, *options_of(config), "--target-bits", 4.5, "--write", path, "--json")
    written = BuildConfig.read(path)
    assert written.budget is None
    linears = json.loads(result.stdout)["linears"]
    assert {name: (it.num_bits, it.rank) for name, it in written.layers.items()} == {
        name: (it["num_bits"], it["rank"]) for name, it in linears.items()
    }
    again = plan_build(checkpoint, written)
    assert again.effective_bits == pytest.approx(json.loads(result.stdout)["effective_bits"])
