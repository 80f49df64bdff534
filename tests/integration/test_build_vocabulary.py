"""Builds with a quantized embedding and output head, against what is measured on the artifacts that they leave."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from models.artifact.inspect import inspect_artifact
from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.build import SilentObserver, build_artifact
from models.build import vocabulary as vocabulary_module
from models.build.vocabulary import quantize_by_rows
from models.cli import make_cli
from models.compare.config import EvaluationConfig, RecipeConfig
from models.compare.fingerprint import Fingerprints
from models.config import BuildConfig, CalibrationConfig, QuantizerConfig, ReconstructConfig, TransformConfig
from models.errors import CalibrationError, SchemeError
from models.evaluate.perplexity import score_window, summarize
from models.llama.batch import Batch
from models.llama.checkpoint import open_checkpoint
from models.quant.grid import dequantize
from models.quant.quantizers import get_quantizer
from models.scheme import EMBEDDING, HEAD, QuantScheme, VocabularyScheme
from models.types import InputStatistics
from service.model_info import ModelInfo
from tests.support.builds import digests
from tests.support.tiny_checkpoints import VOCAB_SIZE, random_tensors, tiny_config, write_checkpoint

LENGTH, NUM_SEQUENCES, NUM_HOLDOUT = 24, 6, 2


def make_checkpoint(directory, *, is_tied):
    """Two layers whose matrices bfloat16 holds exactly, so that storing them at 16 bits loses nothing."""
    values = tiny_config(hidden_size=64, intermediate_size=96, tie_word_embeddings=is_tied)
    tensors = random_tensors(values)
    for name in {f"{EMBEDDING}.weight", f"{HEAD}.weight"} & tensors.keys():
        tensors[name] = tensors[name].bfloat16().float()
    return write_checkpoint(directory, values, tensors)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {
        is_tied: make_checkpoint(tmp_path_factory.mktemp("checkpoint"), is_tied=is_tied) for is_tied in (False, True)
    }


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB_SIZE, (NUM_SEQUENCES + NUM_HOLDOUT, LENGTH), generator=generator)


@pytest.fixture
def config(tokens, tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(tokens.flatten().tolist()), encoding="utf-8")
    calibration = CalibrationConfig(
        source=str(path),
        num_sequences=NUM_SEQUENCES,
        sequence_length=LENGTH,
        num_holdout=NUM_HOLDOUT,
        batch_size=4,
        inputs="dense",
    )
    return BuildConfig(
        scheme=QuantScheme(group_size=32), reconstruct=ReconstructConfig(rank=4), calibration=calibration
    )


def perplexity_of(model, tokens):
    return summarize([score_window(model, it, LENGTH - 1) for it in tokens[NUM_SEQUENCES:]]).perplexity


@pytest.mark.parametrize(
    ("head_bits", "embedding_bits", "is_tied"),
    [(8, 16, True), (4, 16, True), (8, 8, True), (4, 8, True), (16, 8, False), (4, 16, False), (8, 8, False)],
)
def test_the_cost_that_a_build_records_is_the_cost_of_what_it_wrote(
    checkpoints, config, tokens, tmp_path, head_bits, embedding_bits, is_tied
):
    checkpoint = open_checkpoint(str(checkpoints[is_tied]))
    without = build_artifact(checkpoint, tmp_path / "without", config)
    chosen = replace(config, vocabulary=VocabularyScheme(head_bits, embedding_bits))
    report = build_artifact(checkpoint, tmp_path / "with", chosen)
    loaded = load_artifact(tmp_path / "with", dtype=torch.float32, backend="reference")
    assert report.quantized_perplexity == pytest.approx(perplexity_of(loaded.model, tokens), rel=1e-4)
    # Calibrated on dense inputs, the layers are those of the build without.
    assert report.dense_vocabulary_perplexity == pytest.approx(without.quantized_perplexity, rel=1e-6)
    assert report.dense_perplexity == pytest.approx(without.dense_perplexity, rel=1e-6)
    assert report.quantized_perplexity != report.dense_vocabulary_perplexity
    assert report.effective_bits == without.effective_bits
    assert without.dense_vocabulary_perplexity is None
    assert loaded.manifest.evaluation["dense_vocabulary_perplexity"] == report.dense_vocabulary_perplexity


def test_layers_are_calibrated_behind_the_embedding_that_is_served(checkpoints, config, tmp_path):
    chosen = replace(config, calibration=replace(config.calibration, inputs="quantized"))
    shards = []
    for bits in (16, 8):
        out = tmp_path / str(bits)
        build = replace(chosen, vocabulary=VocabularyScheme(embedding_bits=bits))
        build_artifact(open_checkpoint(str(checkpoints[False])), out, build)
        shards.append((out / "model-00001-of-00003.safetensors").read_bytes())
    assert shards[0] != shards[1]


def final_states(directory, tokens):
    """(num_tokens, hidden_size) float64 that the served network's head sees of the calibration set."""
    model = load_artifact(directory, dtype=torch.float32, backend="reference").model
    with torch.inference_mode():
        return torch.cat([model(Batch.uncached([it.tolist()])) for it in tokens[:NUM_SEQUENCES]]).double()


def output_error(weight, found, inputs):
    return float((inputs @ (weight - found).T).norm() / (inputs @ weight.T).norm())


def test_a_head_of_four_bits_makes_up_for_its_rounding_where_the_calibration_set_looks(
    checkpoints, config, tokens, tmp_path
):
    config = replace(config, calibration=replace(config.calibration, inputs="quantized"))
    checkpoint = open_checkpoint(str(checkpoints[False]))
    build_artifact(checkpoint, tmp_path / "a", replace(config, vocabulary=VocabularyScheme(head_bits=4)))
    weight = checkpoint.tensor(f"{HEAD}.weight").double()
    inputs = final_states(tmp_path / "a", tokens)
    with ArtifactReader.open(tmp_path / "a") as reader:
        record, quantized = reader.manifest.vocabulary[HEAD], reader.linear(HEAD).quantized
    error = output_error(weight, dequantize(quantized).double(), inputs)
    assert record.relative_output_error == pytest.approx(error, rel=1e-3)
    rounded = get_quantizer(QuantizerConfig(), quantized.scheme).bind(InputStatistics(0))(weight.float())
    assert error < 0.9 * output_error(weight, dequantize(rounded).double(), inputs)
    difference = float((weight - dequantize(quantized).double()).norm() / weight.norm())
    assert record.relative_weight_error == pytest.approx(difference, rel=1e-6)


def test_without_calibration_grids_are_searched_with_the_gain_of_the_norm_for_importance(checkpoints, tmp_path):
    config = BuildConfig(
        scheme=QuantScheme(group_size=32),
        reconstruct=ReconstructConfig("none"),
        calibration=CalibrationConfig(source="none"),
        vocabulary=VocabularyScheme(4, 8),
    )
    checkpoint = open_checkpoint(str(checkpoints[True]))
    report = build_artifact(checkpoint, tmp_path / "a", config)
    assert report.dense_vocabulary_perplexity is None
    weight = checkpoint.tensor(f"{EMBEDDING}.weight")
    with ArtifactReader.open(tmp_path / "a") as reader:
        for path, use_clip_search in ((HEAD, True), (EMBEDDING, False)):
            quantized, record = reader.linear(path).quantized, reader.manifest.vocabulary[path]
            likely = InputStatistics(0, mean_square=checkpoint.tensor("model.norm.weight").double() ** 2)
            expected = get_quantizer(QuantizerConfig(use_clip_search=use_clip_search), quantized.scheme).bind(likely)
            assert torch.equal(quantized.codes, expected(weight).codes)
            assert torch.equal(quantized.scale, expected(weight).scale)
            assert record.relative_output_error is None


def test_rows_are_quantized_some_at_a_time_as_they_are_all_at_once(monkeypatch):
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    quantize = get_quantizer(QuantizerConfig(), QuantScheme(8, 64, is_symmetric=True)).bind(InputStatistics(0))
    whole = quantize(weight)
    monkeypatch.setattr(vocabulary_module, "_ROWS_AT_ONCE", 33)
    parts = quantize_by_rows(weight, quantize, torch.device("cpu"))
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)


class InterruptingObserver(SilentObserver):
    """Stops a build after a layer."""

    def __init__(self, after):
        self.after = after

    def progress(self, done, note=""):
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("point", ["after a layer", "after the rest"])
def test_an_interrupted_build_goes_on_and_ends_in_the_same_bytes(checkpoints, config, tmp_path, monkeypatch, point):
    config = replace(config, vocabulary=VocabularyScheme(4, 8))
    checkpoint = open_checkpoint(str(checkpoints[True]))
    build_artifact(checkpoint, tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        observer = InterruptingObserver(1)
        if point == "after the rest":
            observer = None
            patch.setattr("models.build.pipeline.evaluate_holdout", interrupt)
        build_artifact(checkpoint, tmp_path / "resumed", config, observer=observer)
    if point == "after the rest":
        monkeypatch.setattr(vocabulary_module, "_head_statistics", interrupt)  # the rest is taken over
    report = build_artifact(checkpoint, tmp_path / "resumed", config)
    assert report.num_resumed_layers == (1 if point == "after a layer" else 2)
    assert digests(tmp_path / "whole") == digests(tmp_path / "resumed")


def interrupt(*_arguments):
    raise KeyboardInterrupt


def test_a_head_that_a_rotation_unties_is_its_own(checkpoints, config, tmp_path):
    checkpoint = open_checkpoint(str(checkpoints[True]))
    chosen = replace(config, vocabulary=VocabularyScheme(16, 8))
    with pytest.raises(SchemeError, match="tied to the embedding"):
        build_artifact(checkpoint, tmp_path / "a", chosen)
    rotated = replace(chosen, transform=TransformConfig(rotation="offline", rotation_block=32))
    build_artifact(checkpoint, tmp_path / "a", rotated)
    with ArtifactReader.open(tmp_path / "a") as reader:
        assert reader.manifest.vocabulary.keys() == {EMBEDDING}
        assert "lm_head.weight" in reader.manifest.tensors


def test_a_weight_that_is_not_finite_names_the_matrix(config, tmp_path):
    values = tiny_config(hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    tensors = random_tensors(values)
    tensors[f"{HEAD}.weight"][3, 5] = float("inf")
    broken = write_checkpoint(tmp_path / "broken", values, tensors)
    with pytest.raises((SchemeError, CalibrationError), match="lm_head"):
        build_artifact(open_checkpoint(str(broken)), tmp_path / "a", replace(config, vocabulary=VocabularyScheme(8)))


def test_formats_and_bytes_are_shown(checkpoints, config, tmp_path):
    build_artifact(
        open_checkpoint(str(checkpoints[True])), tmp_path / "a", replace(config, vocabulary=VocabularyScheme(4, 8))
    )
    build_artifact(open_checkpoint(str(checkpoints[True])), tmp_path / "b", config)
    inspection = inspect_artifact(tmp_path / "a", "cpu", is_verified=True)
    rows = inspection.summary_rows()
    assert rows["vocabulary"] == "head 4 bits, embedding 8 bits"
    assert rows["embedding"].startswith("INT8 symmetric, group 64, 8.25 bits per weight")
    assert rows["output head"].startswith("INT4 symmetric, group 64, 4.25 bits per weight")
    assert "holdout dense_vocabulary_perplexity" in rows
    assert sum(inspection.num_layers_by_backend.values()) == 7 * 2 + 1
    assert len(inspection.layer_rows()) == 7 * 2
    values = inspection.to_dict()
    assert values["head"]["num_bytes"] == VOCAB_SIZE * (64 // 2 + 2)
    assert values["embedding"]["num_bytes"] == VOCAB_SIZE * (64 + 2)
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "head 4 bits, embedding 8 bits" in page
    assert "INT4 symmetric, group 64, 4.25 bits per weight" in page
    assert "dense vocabulary perplexity" in page
    loaded = load_artifact(tmp_path / "a")
    card = ModelInfo("tiny", 128, loaded.manifest, loaded.selections).card()["artifact"]
    assert card["head"] == values["head"]
    assert card["embedding"] == values["embedding"]
    rows = inspect_artifact(tmp_path / "b", "cpu", is_verified=True).summary_rows()
    assert rows["embedding"].startswith("BF16, 16 bits per weight")
    assert rows["output head"] == "the embedding"
    assert "vocabulary" not in rows


def test_the_command_line_builds_what_it_is_told(checkpoints, config, tmp_path):
    arguments = ["build", str(checkpoints[True]), "--out", str(tmp_path / "a"), "--group-size", "32", "--rank", "4"]
    arguments += ["--calibration", config.calibration.source, "--num-sequences", "4", "--sequence-length", "24"]
    arguments += ["--num-holdout", "1", "--head-bits", "4", "--embedding-bits", "8"]
    result = CliRunner().invoke(make_cli(), arguments)
    assert result.exit_code == 0, result.output
    assert "with embedding and head at 16 bits" in result.output
    with ArtifactReader.open(tmp_path / "a") as reader:
        assert reader.manifest.build.vocabulary == VocabularyScheme(4, 8)
    result = CliRunner().invoke(make_cli(), ["plan", *arguments[1:2], *arguments[4:], "--no-gradients", "--json"])
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout.splitlines()[-1])["component_bytes"]
    assert (planned["head"], planned["embedding"]) == (VOCAB_SIZE * 34, VOCAB_SIZE * 66)


def test_results_from_before_stay_valid_unless_the_vocabulary_is_quantized(config):
    prints = Fingerprints("checkpoint", EvaluationConfig(), "cpu")

    def of(build):
        return prints.recipe(RecipeConfig("name", build)), prints.statistics(build)

    plain, chosen = of(config), of(replace(config, vocabulary=VocabularyScheme(8, 8)))
    before = {name: value for name, value in config.to_dict().items() if name != "vocabulary"}
    assert of(BuildConfig.from_dict(before)) == plain
    assert chosen[0] != plain[0]
    assert chosen[1] == plain[1]
