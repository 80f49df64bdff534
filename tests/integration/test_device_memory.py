"""What ``qerve plan`` says of a GPU's memory: held against builds that are counted, and for the large shapes."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from models.build.device_footprint import DevicePhase, device_memory
from models.build.layer import LayerBuilder
from models.build.resting import Moved, resting
from models.cli_plan import plan as plan_verb
from models.config import (
    BuildConfig,
    CalibrationConfig,
    QuantizerConfig,
    ReconstructConfig,
    TrainingConfig,
    TransformConfig,
)
from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.llama.config import LlamaConfig
from models.scheme import ActivationScheme, QuantScheme
from models.types import InputStatistics
from tests.support.one_layer import NoWriter, streams_of
from tests.support.peak_tensors import PeakTensors
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
LIBRARIES = GIB
"""Left to a CUDA context and the workspaces of its libraries."""

TENSORS_PER_FILE = 64

GPTQ = {"quantizer": QuantizerConfig("gptq")}
QERA = {"reconstruct": ReconstructConfig("qera-exact", rank=8)}
CASES = {
    "rtn": {},
    "gptq": GPTQ,
    "qera-exact": QERA,
    "qera-exact on gptq": GPTQ | QERA,
    "qera-exact, rotated": QERA | {"transform": TransformConfig(rotation="online", rotation_block=32)},
    "qera-exact, shrunk": QERA | {"shrinkage": 0.3},
    "qera-exact, refitted": {"reconstruct": ReconstructConfig("qera-exact", rank=8, refit=True)},
    "qera-exact, sequential": QERA | {"inputs": "sequential"},
    "lqer": {"reconstruct": ReconstructConfig("lqer", rank=8)},
    "serq": {"reconstruct": ReconstructConfig("serq", rank=8)},
}
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                    "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
METHODS = ("rtn", "gptq", "qera-exact", "qera-exact on gptq", "qer", "qer on gptq")
QUICK = {("rtn", 256), ("gptq", 16), ("qera-exact", 256), ("qera-exact, refitted", 16), ("serq", 16)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    values = tiny_config(hidden_size=128, intermediate_size=352, num_hidden_layers=1, num_attention_heads=4)
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, random_tensors(values))))


def config_of(case: str, num_tokens: int) -> BuildConfig:
    changes = dict(CASES[case])
    calibration = {name: changes.pop(name) for name in ("shrinkage", "inputs") if name in changes}
    base = BuildConfig(
        scheme=QuantScheme(num_bits=4, group_size=32),
        reconstruct=ReconstructConfig("none"),
        calibration=CalibrationConfig(
            source="text.txt", num_sequences=2, sequence_length=num_tokens, batch_size=1, num_holdout=0, **calibration
        ),
    )
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("case", "num_tokens"),
    [
        pytest.param(case, num_tokens, marks=() if (case, num_tokens) in QUICK else pytest.mark.slow)
        for case in CASES
        for num_tokens in (16, 256)
    ],
)
def test_what_building_a_layer_takes_is_what_the_plan_says(checkpoint, case, num_tokens):
    config = config_of(case, num_tokens)
    streams = streams_of(checkpoint, config, has_target=config.reconstruct.refit)
    builder = LayerBuilder(config, DenseWeights(checkpoint, torch.float32, CPU), NoWriter())
    with PeakTensors() as measured:
        builder.step(range(1), streams, is_finished=False)
    phases = device_memory(checkpoint.config, config, CPU)
    predicted = max(phases[DevicePhase.STATISTICS], phases[DevicePhase.QUANTIZING])
    assert measured.peak_bytes < 1.05 * predicted
    assert measured.peak_bytes > 0.7 * predicted


def sparse_checkpoint(directory: Path, shape: str) -> Path:
    """A checkpoint of ``shape`` in bfloat16 whose files are headers and holes: their sizes, and no data on the disk."""
    values = tiny_config(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False)
    write_checkpoint(directory, tiny_config(), random_tensors(tiny_config()))
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = list(LlamaConfig.from_hf(values, "config.json").tensor_shapes().items())
    for start in range(0, len(tensors), TENSORS_PER_FILE):
        write_hollow(directory / f"model-{start:05}.safetensors", dict(tensors[start : start + TENSORS_PER_FILE]))
    return directory


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, dimensions in shapes.items():
        start, end = end, end + 2 * torch.Size(dimensions).numel()
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return {shape: sparse_checkpoint(tmp_path_factory.mktemp(shape), shape) for shape in SHAPES}


def planned(directory: Path, *options: str) -> tuple[dict[str, int], str]:
    app = typer.Typer()
    app.command()(plan_verb)
    common = [str(directory), "--calibration", "none", "--num-bits", "4", "--group-size", "128", *options]
    as_json = CliRunner().invoke(app, [*common, "--json"])
    assert as_json.exit_code == 0, as_json.exception or as_json.output
    return json.loads(as_json.stdout)["gpu_memory_bytes"], CliRunner().invoke(app, common).output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "limit"), [("llama-2-7b", 8), ("llama-2-70b", 24)])
def test_large_networks_build_on_small_gpus_by_the_plan(large, shape, limit, method):
    network = open_checkpoint(str(large[shape])).config
    phases = device_memory(network, large_config(method), GPU)
    assert DevicePhase.STATISTICS in phases
    assert max(phases.values()) < limit * GIB - LIBRARIES


def large_config(method: str) -> BuildConfig:
    """With text from outside: 128 sequences of 2048 tokens."""
    is_gptq, is_trained = "gptq" in method, method.split(maxsplit=1)[0] == "qer"
    name = "qer" if is_trained else "qera-exact" if "qera" in method else "none"
    return BuildConfig(
        scheme=QuantScheme(4, 128),
        quantizer=QuantizerConfig("gptq" if is_gptq else "rtn"),
        reconstruct=ReconstructConfig(name, rank=0 if name == "none" else 32),
        activations=ActivationScheme(8) if is_trained else None,
        calibration=CalibrationConfig(source="text.txt"),
        training=TrainingConfig(use_checkpointing=True),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_verb_prints_what_a_gpu_needs(large, shape):
    phases, printed = planned(large[shape], "--method", "none")
    assert phases["quantizing"] > 0
    assert "memory of a GPU to build on" in printed
    assert f"{max(phases.values()) / GIB:.2f} GiB" in printed


def test_text_of_the_network_s_own_takes_the_whole_network(checkpoint):
    network = replace(checkpoint.config, **SHAPES["llama-2-7b"], head_dim=128)
    config = replace(large_config("rtn"), calibration=CalibrationConfig(source="self"))
    assert device_memory(network, config, GPU)[DevicePhase.TEXT] > 8 * GIB


def test_statistics_rest_in_the_host_s_memory_each_once():
    shared = InputStatistics(5, autocorrelation=torch.eye(3, device="meta"))
    other = InputStatistics(5, mean_square=torch.ones(3))
    moved = Moved(torch.device("meta"))
    there = moved.to_device(InputStatistics(5, autocorrelation=torch.eye(3)))
    assert there.autocorrelation.device.type == "meta"
    first, again = moved.to_device(other), moved.to_device(replace(other, num_tokens=6))
    assert first.mean_square is again.mean_square
    assert moved.to_host(first).mean_square is other.mean_square
    on_cpu = resting({"a": other, "b": other})
    assert on_cpu["a"].mean_square is other.mean_square
    assert moved.to_device(shared).autocorrelation is shared.autocorrelation
