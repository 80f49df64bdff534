"""A ceiling on memory: refused at once with what takes most, or kept with the hidden states on disk."""

from dataclasses import replace

import pytest
import torch

from models.build.ceiling import MemoryNeed, memory_need
from models.config import BudgetConfig, BuildConfig, CalibrationConfig, ReconstructConfig, TransformConfig
from models.errors import SchemeError
from models.llama.config import LlamaConfig

CPU, GIB = torch.device("cpu"), 1 << 30
LLAMA_2_7B = LlamaConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "LLaMA-2-7B",
)
TEXT = CalibrationConfig("text.txt", num_sequences=128, sequence_length=2048, batch_size=1, num_holdout=4)
QERA = BuildConfig(reconstruct=ReconstructConfig("qera-approx", 32), calibration=TEXT)


def memory(**changes: object) -> MemoryNeed:
    return memory_need(LLAMA_2_7B, replace(QERA, **changes), CPU)


def test_the_hidden_states_are_those_of_every_stream() -> None:
    per_sequence = 4 * 2048 * 4096
    assert memory().hidden == (128 + 2 * 4) * per_sequence
    assert memory(calibration=CalibrationConfig("none"), reconstruct=ReconstructConfig("none")).hidden == 0


def test_what_is_enough_for_everything_keeps_it_in_memory_and_a_byte_less_does_not() -> None:
    needs = memory()
    assert needs.total == needs.program + needs.working + needs.hidden
    assert not needs.must_spill(needs.total)
    assert needs.must_spill(needs.total - 1)
    assert needs.must_spill(needs.least)
    with pytest.raises(SchemeError, match=r"max_memory .* GiB: this build takes about .* calibration set on disk"):
        needs.must_spill(needs.least - 1)


def test_seven_billion_weights_are_built_in_six_gibibytes_with_the_set_on_disk() -> None:
    needs = memory()
    assert needs.hidden > 4 * GIB
    assert needs.least < 6 * GIB < needs.total


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transform": TransformConfig(flatten=0.5)}, "flattening"),
        ({"budget": BudgetConfig(target_bits=4.5)}, "target bits"),
    ],
)
def test_what_looks_at_all_states_beforehand_is_not_promised_to_spill(changes, reason) -> None:
    needs = memory(**changes)
    assert needs.least == needs.total
    with pytest.raises(SchemeError, match=f"which stay in memory since {reason}"):
        needs.must_spill(needs.total - 1)


def test_a_gpu_takes_the_work_off_the_host() -> None:
    assert memory_need(LLAMA_2_7B, QERA, torch.device("cuda")).working < memory().working
