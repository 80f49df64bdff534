"""The files in examples/: read by the real readers and checked against a network of SmolLM2-135M's shape."""

from pathlib import Path

import pytest

from models.build.plan import check_build
from models.compare.config import CompareConfig
from models.llama.config import LlamaConfig
from tests.support.tiny_checkpoints import tiny_config

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.toml"))
SMOLLM2 = LlamaConfig.from_hf(
    tiny_config(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, vocab_size=49152,
    ),
    "config.json",
)  # fmt: skip


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_recipe_of_an_example_can_be_carried_out(path: Path) -> None:
    recipes = CompareConfig.read(path).expanded()
    assert len({recipe.name for recipe in recipes}) == len(recipes) > 1
    for recipe in recipes:
        check_build(recipe.build, SMOLLM2)
