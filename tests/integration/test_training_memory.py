"""The memory that ``qerve plan`` predicts for training is what a training allocates."""

from dataclasses import replace

import pytest
import torch

from models.build.layer import LayerBuilder
from models.build.training_footprint import training_memory_bytes
from models.config import (
    BuildConfig,
    CalibrationConfig,
    QuantizerConfig,
    ReconstructConfig,
    TrainingConfig,
    TransformConfig,
)
from models.llama.checkpoint import DenseWeights, open_checkpoint
from models.scheme import ActivationScheme, QuantScheme
from tests.support.one_layer import NoWriter, streams_of
from tests.support.peak_tensors import PeakTensors
from tests.support.tiny_checkpoints import random_tensors, tiny_config, write_checkpoint

CPU = torch.device("cpu")
CHECKPOINTING = {"training": TrainingConfig(use_checkpointing=True)}
CASES = {
    "fixed-point": {},
    "inside-rounding": {},
    "shift": {},
    "requantize": {},
    "none": {},
    "fixed-point recomputed": CHECKPOINTING,
    "none recomputed": CHECKPOINTING,
    "fixed-point in bfloat16, recomputed": {"training": TrainingConfig(use_checkpointing=True, precision="bfloat16")},
    "fixed-point in bfloat16": {"training": TrainingConfig(precision="bfloat16")},
    "fixed-point two blocks": {"training": TrainingConfig(num_blocks=2)},
    "fixed-point two blocks recomputed": {"training": TrainingConfig(num_blocks=2, use_checkpointing=True)},
    "fixed-point on gptq": {"quantizer": QuantizerConfig("gptq")},
    "fixed-point rotated": {"transform": TransformConfig(rotation="online", rotation_block=64)},
    "fixed-point weights only": {"activations": None},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    values = tiny_config(hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4)
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), values, random_tensors(values))))


def config_of(case: str, num_tokens: int) -> BuildConfig:
    merge = case.split(" ", maxsplit=1)[0]
    base = BuildConfig(
        scheme=QuantScheme(num_bits=4, group_size=-1),
        activations=ActivationScheme(num_bits=4),
        reconstruct=ReconstructConfig("qer", rank=0 if merge == "none" else 8, options={"merge": merge}),
        calibration=CalibrationConfig(num_sequences=2, sequence_length=num_tokens, batch_size=1, num_holdout=0),
    )
    return replace(base, **CASES[case])


@pytest.mark.parametrize("num_tokens", [pytest.param(16, marks=pytest.mark.slow), 384])
@pytest.mark.parametrize("case", CASES)
def test_what_training_takes_is_what_the_plan_says(checkpoint, case, num_tokens):
    config = config_of(case, num_tokens)
    streams = streams_of(checkpoint, config, has_target=True)
    builder = LayerBuilder(config, DenseWeights(checkpoint, torch.float32, CPU), NoWriter())
    with PeakTensors() as measured:
        builder.step(range(config.training.num_blocks), streams, is_finished=False)
    predicted = training_memory_bytes(checkpoint.config, config, CPU)
    assert measured.peak_bytes < 1.05 * predicted
    assert measured.peak_bytes > 0.7 * predicted


def test_one_layer_of_llama_2_7b_fits_a_gpu_of_8_gib(checkpoint):
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128, "num_hidden_layers": 32}
    network = replace(checkpoint.config, num_attention_heads=32, num_key_value_heads=32, **shape)
    config = replace(
        config_of("fixed-point", 2048), training=TrainingConfig(use_checkpointing=True, precision="bfloat16")
    )
    for quantizer in (QuantizerConfig(), QuantizerConfig("gptq")):
        assert training_memory_bytes(network, replace(config, quantizer=quantizer), torch.device("cuda")) < 8 * 2**30


def test_a_method_that_does_not_train_has_no_such_memory(checkpoint):
    assert training_memory_bytes(checkpoint.config, BuildConfig(), CPU) is None
