"""How an artifact was made, in words: of `qerve inspect` and of the server's model card."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.artifact.describe import describe_build, describe_quantizer, describe_transform
from models.artifact.inspect import inspect_artifact
from models.artifact.load import load_artifact
from models.config import (
    BudgetConfig,
    BuildConfig,
    CalibrationConfig,
    LayerConfig,
    QuantizerConfig,
    ReconstructConfig,
    TransformConfig,
)
from models.scheme import ActivationScheme, QuantScheme, VocabularyScheme
from service.model_info import ModelInfo
from tests.support.artifact_builder import LinearKind, mixed_model, write_artifact
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

EVERYTHING = BuildConfig(
    scheme=QuantScheme(4, 16, format="mxint", exponent="ceil"),
    activations=ActivationScheme(4, 128, clip_ratio=0.9),
    attention=ActivationScheme(6, 32, is_symmetric=True),
    quantizer=QuantizerConfig("gptq", use_clip_search=True, use_act_order=True, damping=0.05),
    reconstruct=ReconstructConfig("srr", 16, "int8", refit=True, options={"split": 4}),
    transform=TransformConfig(flatten=0.5, permute=True, rotation="online", rotation_block=64),
    calibration=CalibrationConfig("wiki.txt", 24, 1024),
    objective="output",
    budget=BudgetConfig(4.25, (3, 4), 32),
    layers={"model.layers.0.mlp.down_proj": LayerConfig(num_bits=8)},
    vocabulary=VocabularyScheme(4, 8),
)
BUILT = replace(EVERYTHING, vocabulary=VocabularyScheme())
"""What there is an artifact of: the model of the test support has no codes for embedding and head."""


def test_every_part_of_a_build_is_described_in_the_order_of_its_work() -> None:
    assert list(describe_build(EVERYTHING).items()) == [
        ("weights", "MXINT4, group 16, ceil exponents, gptq, clip search, act order, damping 0.05"),
        ("activations", "INT4 asymmetric, group 128, clip ratio 0.9"),
        ("vocabulary", "head 4 bits, embedding 8 bits"),
        ("attention inputs", "INT6 symmetric, group 32"),
        ("transform", "flatten 0.5, permute, rotation online in blocks of 64"),
        ("objective", "output"),
        ("correction", "srr, rank 16, int8, refit, split 4"),
        ("budget", "4.25 bits per weight from widths 3, 4, rank up to 32"),
        ("exceptions", "1 linear layers"),
        ("calibration", "wiki.txt, 24 x 1024 tokens, quantized inputs"),
    ]


def test_what_a_build_does_not_use_is_not_mentioned() -> None:
    assert describe_build(BuildConfig()) == {
        "weights": "INT4 asymmetric, group 64, rtn",
        "correction": "qera-exact, rank 32, bfloat16",
        "calibration": "self, 128 x 2048 tokens, quantized inputs",
    }
    assert describe_quantizer(QuantizerConfig("gptq")) == "gptq"
    assert describe_transform(TransformConfig(rotation="offline")) == "rotation offline over the whole width"
    assert describe_transform(TransformConfig()) is None


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("described") / "art"
    model = mixed_model(LinearKind(), vocab_size=VOCAB_SIZE)
    write_artifact(directory, model, build=BUILT, tokenizer_files=tokenizer_files())
    return directory


def test_inspect_shows_how_layers_differ_and_what_would_run_them(artifact: Path) -> None:
    inspection = inspect_artifact(artifact, "cpu", is_verified=True)
    rows = inspection.summary_rows()
    assert describe_build(BUILT).items() <= rows.items()
    assert rows["  INT4 asymmetric, group 32"] == rows["  MXINT4, group 32, ceil exponents"] == "7 linear layers"
    first, *_others, last = inspection.layer_rows()
    assert first[1:4] == ("4", "32", "4")
    assert last[1:4] == ("mxint4", "32", "4")
    values = inspection.to_dict()
    assert isinstance(values["build"], dict)
    assert values["build"]["quantizer"]["method"] == "gptq"


def test_the_model_card_tells_everything_that_acts_on_a_layer(artifact: Path) -> None:
    loaded = load_artifact(artifact)
    card = ModelInfo("tiny", 64, loaded.manifest, loaded.selections).card()["artifact"]
    expected = {
        "method": "srr",
        "quantizer": "gptq, clip search, act order, damping 0.05",
        "activations": "INT4 asymmetric, group 128, clip ratio 0.9",
        "attention": "INT6 symmetric, group 32",
        "transform": "flatten 0.5, permute, rotation online in blocks of 64",
        "objective": "output",
        "budget": "4.25 bits per weight from widths 3, 4, rank up to 32",
        "rank": 4,
    }
    assert expected.items() <= card.items()
    assert {(scheme["format"], scheme["exponent"], scheme["group_size"]) for scheme in card["schemes"]} == {
        ("int", "floor", 32),
        ("mxint", "ceil", 32),
    }
