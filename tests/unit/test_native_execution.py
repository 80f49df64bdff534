"""What an operator chooses about the kernels, and what is said about them: reasons, one warning, tables."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.artifact.execution import RunOptions
from models.artifact.inspect import inspect_artifact
from models.artifact.load import load_artifact
from models.errors import KernelError
from models.llama.model import LlamaForCausalLM
from models.llama.native import NativeLlama
from models.scheme import QuantScheme
from tests.support.artifact_builder import LinearKind
from tests.support.native import needs_native
from tests.support.native_network import Saved, logits_of, network_of, save

NOWHERE = "/nowhere/_qerve_cpu.so"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("execution") / "a", network_of())


@needs_native
def test_a_fused_network_says_so_and_names_instructions_threads_and_inputs(saved: Saved) -> None:
    loaded = saved.loaded(activations="16")
    assert isinstance(loaded.model, NativeLlama)
    rows = loaded.execution.rows()
    assert rows["network"] == "one list of native operators"
    assert rows["native kernels"].startswith(loaded.model.runtime.isa)
    assert rows["threads"].startswith(str(loaded.model.runtime.num_threads))
    assert rows["inputs"].startswith("16 bits")


@needs_native
def test_inspection_tells_how_the_network_would_run_without_loading_it(saved: Saved) -> None:
    for activations in ("8", "16"):
        inspection = inspect_artifact(saved.path, "cpu", True, RunOptions(activations=activations))  # type: ignore[arg-type]
        assert inspection.execution == saved.loaded(activations=activations).execution
        assert inspection.summary_rows() | inspection.execution.rows() == inspection.summary_rows()
        assert inspection.to_dict()["execution"] == inspection.execution.rows()


def test_a_missing_library_is_one_warning_with_reason_and_remedy(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QERVE_CPU_LIBRARY", NOWHERE)
    with caplog.at_level(logging.WARNING):
        loaded = saved.loaded()
    (record,) = caplog.records
    assert "without native kernels" in record.message
    assert NOWHERE in record.message
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert NOWHERE in loaded.execution.rows()["native kernels"]
    assert "model.layers.0.self_attn.q_proj runs on the backend" in str(loaded.execution.unfused)
    assert all(NOWHERE in dict(item.passed_over)["native"] for item in loaded.selections.values())


def test_another_backend_by_choice_is_no_reason_to_warn(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_artifact(saved.path, backend="reference")
    assert not caplog.records
    assert loaded.execution.native == {}
    assert "runs on the backend reference (it was asked for)" in str(loaded.execution.unfused)


def test_the_native_backend_by_name_without_its_library_is_refused(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QERVE_CPU_LIBRARY", NOWHERE)
    with pytest.raises(KernelError, match=r"q_proj: no kernel backend can run this layer \(native: .*nowhere"):
        saved.loaded(backend="native")


@needs_native
@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (LinearKind(), {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic rotary embeddings"),
        (LinearKind(), {"head_dim": 8}, "heads have 8 channels, the kernels take multiples of 16"),
        (LinearKind(QuantScheme(4, 16)), {}, "q_proj runs on the backend .*multiple of 32 input channels, not by 16"),
        (LinearKind(has_input_scale=True), {}, "model.layers.0.mlp: gate_proj and up_proj treat their common input"),
    ],
)
def test_what_cannot_be_fused_runs_layer_by_layer_with_the_reason(
    kind: LinearKind, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    model = network_of(kind, **changes)
    if kind.has_input_scale:
        path = "model.layers.0.mlp.up_proj"
        model.linears[path] = replace(model.linears[path], input_scale=torch.full((64,), 2.0))
    artifact = save(tmp_path / "a", model)
    loaded = artifact.loaded(activations="16")
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert loaded.execution.unfused is not None
    assert re.search(reason, loaded.execution.unfused)
    difference = logits_of(loaded.model) - logits_of(artifact.reference())
    assert float(difference.abs().max()) < 0.05 * float(logits_of(artifact.reference()).abs().max())
    assert artifact.loaded(kv_cache_dtype="int8").model.new_cache(2).dtype == torch.int8
    assert artifact.loaded(kv_cache_dtype="fp16").model.new_cache(2).nbytes == 2 * loaded.model.cache_block_bytes // 2


@pytest.mark.parametrize("options", [{"activations": "12"}, {"kv_cache_dtype": "fp8"}])
def test_unknown_choices_are_refused_with_the_known_ones(options: dict[str, str]) -> None:
    with pytest.raises(KernelError, match="is unknown; choose one of auto, "):
        RunOptions(**options)  # type: ignore[arg-type]


@needs_native
def test_the_network_that_was_packed_is_let_go(saved: Saved) -> None:
    loaded = saved.loaded()
    assert isinstance(loaded.model, NativeLlama)
    # nothing but the embedding is held in the form that the artifact has
    assert sum(loaded.resident_bytes.values()) == sum(loaded.model.weights.resident_bytes.values())
