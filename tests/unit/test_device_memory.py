"""Plans of a card's memory: parts that add up to the budget, and serving that keeps to them, on a made-up card."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from models.artifact.format import Manifest
from models.artifact.load import ArtifactWeights
from models.artifact.reader import ArtifactReader, Description
from models.artifact.serving import artifact_weight_bytes
from models.cli_plan import plan as plan_verb
from models.errors import QerveError
from models.kernels import get_backends
from models.llama.device_memory import (
    CONTEXT_BYTES,
    ServingShape,
    estimate_graphs,
    estimate_workspace,
    plan_memory,
    plan_serving,
    weight_bytes,
)
from models.llama.model import LlamaForCausalLM
from models.llama.paged_network import PagedLlama
from models.scheme import QuantScheme
from service.engine.capacity import plan_cache
from service.gpu import GpuServing, gpu_serving, read_device_memory
from service.metrics import Metrics
from service.settings import Settings
from tests.support.artifact_builder import LinearKind, write_artifact
from tests.support.native_network import network_of
from tests.support.paged_steps import next_tokens, scattered
from tests.support.peak_tensors import PeakTensors
from tests.support.recorder import RecordingDevice
from tests.unit.test_paged_network import build, texts

GIB = 1 << 30
CONFIG = build("llama_grouped_tied").config


class MadeUpCard:
    """A card of which others hold some."""

    def __init__(self, total_bytes: int, allocated_bytes: int = 0, held_by_others: int = 0) -> None:
        self.total_bytes = total_bytes
        self.allocated_bytes = allocated_bytes
        self.free_bytes = total_bytes - allocated_bytes - held_by_others

    def peak_bytes(self, run: Callable[[], object]) -> int:
        with PeakTensors() as meter:
            run()
        return meter.peak_bytes


def serving(total: int = GIB, model: PagedLlama | None = None, held: int = 0, **options: object) -> GpuServing:
    values = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 64} | options
    return GpuServing(
        model or build("llama_grouped_tied"),
        Settings.model_validate(values),
        MadeUpCard(total, 1000, held),
        has_ranks=False,
    )


@given(
    st.integers(1, 1 << 38),
    st.integers(0, 1 << 36),
    st.integers(0, 1 << 34),
    st.integers(0, 1 << 32),
    st.integers(1, 1 << 26),
    st.none() | st.integers(1, 1 << 20),
)
def test_the_parts_add_up_to_the_budget_whatever_is_asked_for(
    budget: int, weights: int, workspace: int, graphs: int, block: int, max_blocks: int | None
) -> None:
    def plan() -> dict[str, int]:
        memory = plan_memory(
            budget,
            weights=weights,
            workspace=workspace,
            graphs=graphs,
            bytes_per_block=block,
            max_blocks=max_blocks,
        )
        assert memory.budget == budget
        return memory.by_kind()

    if budget < weights + workspace + graphs + 2 * block:
        with pytest.raises(QerveError, match="leave no room"):
            plan()
        return
    parts = plan()
    assert sum(parts.values()) == budget
    assert min(parts.values()) >= 0
    num_blocks, rest = divmod(parts["kv_cache"], block)
    assert rest == 0
    assert num_blocks == max_blocks + 1 if max_blocks and max_blocks < num_blocks else parts["free"] >= 0
    assert parts["free"] < block or num_blocks == (max_blocks or 0) + 1


def test_the_workspace_is_estimated_above_what_a_step_takes_but_not_far() -> None:
    """The peak of tensors of a real forward pass, counted at every operator."""
    model = build("llama_grouped_tied")
    for tokens, rows in ((64, 4), (256, 2)):
        gpu = serving(model=model, max_num_batched_tokens=tokens, max_num_seqs=rows)
        with PeakTensors() as meter:
            gpu._largest_step()
        estimate = estimate_workspace(CONFIG, ServingShape(rows, tokens), torch.float32) - CONTEXT_BYTES
        assert meter.peak_bytes <= 1.5 * estimate
        assert estimate <= 4 * meter.peak_bytes


def test_recorded_steps_take_what_the_largest_one_does_and_something_for_each() -> None:
    one, two, three = (
        estimate_graphs(CONFIG, ServingShape(8, 64, sizes), torch.bfloat16) for sizes in ((8,), (4, 8), (2, 4, 8))
    )
    assert 0 < three - two < two - one < one
    assert estimate_graphs(CONFIG, ServingShape(8, 64), torch.bfloat16) == 0
    assert estimate_graphs(CONFIG, ServingShape(8, 64, (4, 8), 2), torch.bfloat16) > two


def test_codes_of_5_to_7_bits_take_8_on_a_card() -> None:
    assert weight_bytes({"packed": 100, "scale": 20}, [(800, 4), (80, 8), (160, 3)]) == 120
    assert weight_bytes({"packed": 100}, [(800, 5), (80, 7)]) == 100 + 300 + 10


@pytest.mark.parametrize("num_bits", [3, 4, 6])
def test_weights_of_an_artifact_are_what_is_stored_and_widened(tmp_path: Path, num_bits: int) -> None:
    manifest: Manifest = write_artifact(
        tmp_path / "art", network_of(LinearKind(scheme=QuantScheme(num_bits=num_bits, group_size=32)))
    )
    size = artifact_weight_bytes(Description.read(tmp_path / "art"))
    stored = sum(manifest.component_bytes.values())
    num_weights = sum(it.in_features * it.out_features for it in manifest.linears.values())
    assert size == stored + (num_weights * 2 // 8 if num_bits == 6 else 0)


def test_a_plan_of_serving_counts_the_tokens_of_its_cache() -> None:
    shape = ServingShape(8, 64, (1, 8))
    plan = plan_serving(CONFIG, 10_000, shape, total=GIB, utilization=0.75)
    assert plan.memory.budget == GIB * 3 // 4
    per_token = 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, channels, bytes
    assert plan.kv_tokens == plan.memory.kv_cache // per_token - 16
    with pytest.raises(QerveError, match="raise gpu_memory_utilization"):
        plan_serving(CONFIG, GIB, shape, total=GIB, utilization=0.75)


def run_plan(*arguments: str) -> str:
    cli = typer.Typer()
    cli.command()(plan_verb)
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_qerve_plan_tells_how_an_artifact_would_be_served(tmp_path: Path) -> None:
    write_artifact(tmp_path / "art", network_of())
    output = run_plan(str(tmp_path / "art"), "--device-memory", "2GiB", "--gpu-memory-utilization", "0.5", "--json")
    serving_plan = json.loads(output)["serving"]
    kinds = [f"{kind}_bytes" for kind in ("weights", "kv_cache", "graphs", "workspace", "free")]
    assert sum(serving_plan[kind] for kind in kinds) == serving_plan["budget_bytes"] == GIB
    assert "kv-cache" in run_plan(str(tmp_path / "art"), "--device-memory", "2GiB")
    for arguments, words in (
        ((), "--device-memory 24GiB"),
        (("--device-memory", "much"), "is not a size"),
        (("--device-memory", "2GiB", "--gpu-memory-utilization", "1.5"), "above 0, 1 at most"),
    ):
        with pytest.raises(QerveError, match=words):
            run_plan(str(tmp_path / "art"), *arguments)


def test_serving_takes_its_share_and_records_within_it(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama_grouped_tied")
    gpu, device = serving(model=model), RecordingDevice()
    memory = gpu.memory
    assert memory.budget == int(GIB * 0.9)
    assert (memory.weights, memory.free < model.cache_block_bytes) == (1000, True)
    limits = gpu.limits(Settings(max_num_seqs=4, max_model_len=64))
    plan = plan_cache(model.config, model.cache_block_bytes, "cuda", 0, limits)
    assert (plan.num_blocks + 1) * model.cache_block_bytes == memory.kv_cache
    cache = model.new_cache(8)
    with caplog.at_level(logging.INFO, "qerve.server"):
        gpu.record(cache, 64, device)
    assert [len(step.output) for step in device.steps] == [4, 2, 1]
    assert "were set aside" in caplog.text
    assert gpu.rows == {"decode graphs": "batch sizes 1, 2, 4"}
    (sequence,) = scattered(texts(3), 8)
    model.step(next_tokens([(sequence, 1)]), cache)
    assert device.steps[-1].num_replays == 1


def test_a_cache_of_a_size_that_was_asked_for_leaves_the_rest_free() -> None:
    model = build("llama_grouped_tied")
    memory = serving(model=model, kv_cache_memory=10 * model.cache_block_bytes).memory
    assert memory.kv_cache == 11 * model.cache_block_bytes
    assert memory.free > GIB // 4
    assert memory.budget == int(GIB * 0.9)


def test_memory_that_others_hold_is_not_taken() -> None:
    with pytest.raises(QerveError, match=r"gpu_memory_utilization 0.9 needs .* are free: lower it"):
        serving(held=GIB * 3 // 4)
    assert serving(held=GIB * 3 // 4, kv_cache_memory="1MiB").memory.free > 0


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [("llama_grouped_tied", {"cuda_graphs": False}, "none: turned off"), ("llama_dynamic_rope", {}, "none: dynamic")],
)
def test_where_nothing_is_recorded_it_is_said_and_nothing_is_set_aside(
    variant: str, options: dict[str, object], words: str
) -> None:
    model, device = build(variant), RecordingDevice()
    gpu = serving(model=model, **options)
    gpu.record(model.new_cache(4), 64, device)
    assert gpu.memory.graphs == 0
    assert not device.steps
    assert gpu.rows["decode graphs"].startswith(words)


class BrokenDevice(RecordingDevice):
    def record(self, run: Callable[[], Tensor]) -> object:  # type: ignore[override]
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_device_that_cannot_record_serves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama_grouped_tied")
    gpu, cache = serving(model=model), model.new_cache(4)
    gpu.record(cache, 64, BrokenDevice())
    assert "recording failed: operation not permitted" in gpu.rows["decode graphs"]
    assert "kernel by kernel" in caplog.text
    (sequence,) = scattered(texts(3), 4)
    assert model.step(next_tokens([(sequence, 3)]), cache) is not None


def test_metrics_tell_what_the_memory_is_given_to() -> None:
    metrics, memory = Metrics("m", 64), serving().memory
    read_device_memory(metrics.read, memory)
    found = {
        sample.labels["kind"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "qerve_device_memory_plan_bytes"
    }
    assert found == memory.by_kind()
    assert sum(found.values()) == int(GIB * 0.9)


def test_without_a_gpu_there_is_no_plan(tmp_path: Path) -> None:
    assert gpu_serving(build("llama_grouped_tied"), Settings(), 0) is None


@pytest.mark.parametrize("num_bits", [3, 4])
def test_loading_holds_one_layer_beside_what_stays(tmp_path: Path, num_bits: int) -> None:
    kind = LinearKind(scheme=QuantScheme(num_bits=num_bits, group_size=32))
    model = network_of(kind, num_hidden_layers=6)
    write_artifact(tmp_path / "art", model)
    with ArtifactReader.open(tmp_path / "art") as reader, PeakTensors() as meter:
        weights = ArtifactWeights(reader, get_backends("reference"), torch.device("cpu"), torch.float32)
        network = LlamaForCausalLM(reader.config, weights)
    # Unpacked, a code is a byte; those of 3 bits are 8 while they are spread, and copied once.
    codes = [it.quantized.codes.numel() for it in model.layer_linears(0).values()]
    beside = 2 * sum(codes) if num_bits == 4 else 24 * max(codes)
    assert meter.peak_bytes <= sum(weights.resident_bytes.values()) + beside
    assert len(network.layers) * sum(codes) > beside  # all layers unpacked at once would not fit
