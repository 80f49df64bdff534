"""The commands of docs/reproduction.md, parsed by the real command line and checked against a network of that shape."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from models.build.plan import check_build
from models.cli import make_cli
from models.cli_options import BUILD_OPTIONS, build_config
from models.llama.config import LlamaConfig
from tests.support.tiny_checkpoints import tiny_config

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reproduction.md").read_text(encoding="utf-8")
VARIABLES = {
    "DEVICE": "cuda",
    "CALIBRATION": "hf:DKYoon/SlimPajama-6B:train",
    "METHOD": "qera-exact",
}
LLAMA_7B = LlamaConfig.from_hf(
    tiny_config(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32,
        max_position_embeddings=4096, vocab_size=32000,
    ),
    "config.json",
)  # fmt: skip


def commands() -> list[list[str]]:
    """Every qerve command of the document's code blocks, its variables put in."""
    found = []
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            words = shlex.split(re.sub(r"\$(\w+)", lambda it: VARIABLES[it[1]], line), comments=True)
            if words[:1] == ["qerve"]:
                found.append(words[1:])
    return found


def parsed(words: list[str]) -> dict[str, object]:
    verbs = typer.main.get_command(make_cli()).commands
    return verbs[words[0]].make_context(words[0], words[1:]).params


def test_the_document_has_commands() -> None:
    assert {words[0] for words in commands()} == {"build", "eval"}


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "build"], ids=" ".join)
def test_build_commands_can_be_carried_out(words: list[str]) -> None:
    params = parsed(words)
    config = build_config(None, {option.name: params[option.name] for option in BUILD_OPTIONS})
    check_build(config, LLAMA_7B)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "eval"], ids=" ".join)
def test_evaluation_commands_are_understood(words: list[str]) -> None:
    assert parsed(words)["model"]
