"""``qerve export vllm``: what is written, what is refused, and what the proof notices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.errors import ExportError
from models.export.verify import verify_export
from models.export.vllm import VllmOptions, export_vllm
from models.scheme import PER_CHANNEL, ActivationScheme, QuantScheme
from tests.support.artifact_builder import LinearKind, random_linear
from tests.support.exports import exportable, write_exportable

INT4 = QuantScheme(4, 32)
INT8 = QuantScheme(8, PER_CHANNEL, is_symmetric=True)
EXACT = 1e-3
"""Logits of these random networks reach 50; float32 sums in another order."""


def export(directory: Path, kind: LinearKind, options: VllmOptions | None = None, **changes: Any) -> Path:
    write_exportable(directory / "artifact", exportable(kind, **changes))
    result = export_vllm(directory / "artifact", directory / "out", options or VllmOptions())
    assert result.worst_weight_error is not None
    assert result.worst_weight_error < 1e-7
    assert result.max_nll_difference < EXACT
    return directory / "out"


def scheme_of(out: Path) -> dict[str, Any]:
    values = json.loads((out / "base" / "config.json").read_text())["quantization_config"]
    return {"format": values["format"], **values["config_groups"]["group_0"]}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LinearKind(INT4), VllmOptions()),
        (LinearKind(QuantScheme(3, 32), has_bias=True), VllmOptions()),
        (LinearKind(QuantScheme(6, PER_CHANNEL), factor_dtype="float16"), VllmOptions()),
        (LinearKind(QuantScheme(4, 16, format="mxint")), VllmOptions()),
        (LinearKind(QuantScheme(4, 32, is_symmetric=True)), VllmOptions(layout="gptq")),
        (LinearKind(INT8, form="none"), VllmOptions(layout="gptq")),
    ],
)
def test_export_says_exactly_what_the_artifact_says(tmp_path: Path, kind: LinearKind, options: VllmOptions) -> None:
    changes = {"num_key_value_heads": 2} | ({"attention_bias": True, "mlp_bias": True} if kind.has_bias else {})
    out = export(tmp_path, kind, options, **changes)
    assert verify_export(out).max_nll_difference < EXACT
    repeated = verify_export(out, tmp_path / "artifact").worst_weight_error
    assert repeated is not None
    assert repeated < 1e-7  # factors in bfloat16 have a few values below float16's normal range


def test_adapter_is_padded_to_a_rank_that_vllm_takes_and_scales_nothing(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4, rank=9))
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert "modules_to_save" in config
    assert not config["modules_to_save"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    down = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert down.shape == (16, 64)
    assert not down[9:].any()
    assert down[:9].any()


def test_single_matrix_becomes_an_adapter_that_selects_its_channels(tmp_path: Path) -> None:
    kind = LinearKind(QuantScheme(4, PER_CHANNEL), rank=8, form="single-factor", has_channel_order=True)
    write_exportable(tmp_path / "artifact", model := exportable(kind))
    result = export_vllm(tmp_path / "artifact", tmp_path / "out", VllmOptions())
    assert result.worst_weight_error is not None
    assert result.worst_weight_error < 1e-7
    down = load_file(tmp_path / "out/adapter/adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ]
    order = model.linears["model.layers.0.mlp.up_proj"].channel_order
    assert order is not None
    assert down.argmax(1).tolist() == order[:8].tolist()
    assert torch.equal(down.sum(1), torch.ones(8, dtype=down.dtype))


def test_quantized_factors_are_rounded_to_the_exports_type(tmp_path: Path) -> None:
    write_exportable(tmp_path / "artifact", exportable(LinearKind(INT4, factor_dtype="int8")))
    result = export_vllm(tmp_path / "artifact", tmp_path / "out", VllmOptions())
    assert result.worst_weight_error is not None
    assert 0 < result.worst_weight_error < 2.0**-10


def test_merged_layers_have_no_adapter(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4, form="none", rank=0))
    assert not (out / "adapter").exists()
    assert "--enable-lora" not in (out / "README.md").read_text()


def test_integer_products_are_announced(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT8, activations=ActivationScheme(8)))
    scheme = scheme_of(out)
    assert scheme["format"] == "int-quantized"
    assert scheme["weights"]["strategy"] == "channel"
    assert scheme["input_activations"]["dynamic"] is True
    assert scheme["input_activations"]["strategy"] == "token"


def test_inputs_are_quantized_on_request_or_left_out(tmp_path: Path) -> None:
    kind = LinearKind(QuantScheme(4, 32, is_symmetric=True))
    assert scheme_of(export(tmp_path / "a", kind, VllmOptions(inputs="int8")))["input_activations"]["symmetric"]
    dropped = export(tmp_path / "b", replace(kind, activations=ActivationScheme(4, 32)), VllmOptions(inputs="drop"))
    assert scheme_of(dropped)["input_activations"] is None


def test_scales_rounded_to_bfloat16_show_in_the_proof(tmp_path: Path) -> None:
    write_exportable(tmp_path / "artifact", exportable(LinearKind(INT4)))
    result = export_vllm(tmp_path / "artifact", tmp_path / "out", VllmOptions(dtype="bfloat16"))
    assert result.worst_weight_error is not None
    assert 1e-4 < result.worst_weight_error < 2.0**-8


def test_quantized_vocabulary_is_written_dense_and_untied(tmp_path: Path) -> None:
    from models.build import build_artifact
    from models.config import BuildConfig
    from models.llama.checkpoint import open_checkpoint
    from tests.support.tiny_checkpoints import write_checkpoint

    settings = {
        "scheme": {"group_size": 16},
        "reconstruct": {"method": "lqer", "rank": 2},
        "calibration": {"source": "none"},
        "vocabulary": {"head_bits": 4, "embedding_bits": 8},
    }
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "checkpoint")))
    build_artifact(checkpoint, tmp_path / "artifact", BuildConfig.from_dict(settings, "test"))
    result = export_vllm(tmp_path / "artifact", tmp_path / "out", VllmOptions())
    assert result.max_nll_difference < 1e-2  # scales times codes of 8 bits are rounded to float16
    assert any("output head is quantized" in note for note in result.notes)
    config = json.loads((tmp_path / "out/base/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "out/base/model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]


REFUSED = [
    (LinearKind(INT4, rotation_block=16), VllmOptions(), "input is rotated.*export dense"),
    (LinearKind(INT4, has_input_scale=True), VllmOptions(), "divided channel by channel.*export dense"),
    (LinearKind(INT4, has_channel_order=True), VllmOptions(), "another order.*--group-size -1"),
    (LinearKind(QuantScheme(format="nf4", group_size=32)), VllmOptions(), "codes of nf4.*--format int"),
    (LinearKind(INT4, activations=ActivationScheme(4, 32)), VllmOptions(), "no format.*--inputs drop"),
    (LinearKind(INT4, activations=ActivationScheme(8)), VllmOptions(), "symmetric weights.*--inputs drop"),
    (LinearKind(INT4), VllmOptions(layout="gptq"), "symmetric integers of 4 or 8.*compressed-tensors"),
    (LinearKind(INT8, activations=ActivationScheme(8)), VllmOptions(layout="gptq"), "no quantized inputs"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_what_vllm_cannot_run_is_refused_in_words(
    tmp_path: Path, kind: LinearKind, options: VllmOptions, message: str
) -> None:
    write_exportable(tmp_path / "artifact", exportable(kind))
    with pytest.raises(ExportError, match=message):
        export_vllm(tmp_path / "artifact", tmp_path / "out", options)
    assert [it.name for it in tmp_path.iterdir()] == ["artifact"]


def test_layers_that_vllm_fuses_need_one_scheme(tmp_path: Path) -> None:
    model = exportable(LinearKind(INT4))
    other = LinearKind(QuantScheme(8, 32))
    path = "model.layers.1.self_attn.k_proj"
    shape = model.config.linear_shapes()[path]
    changed = random_linear(shape.out_features, shape.in_features, other, torch.Generator())
    write_exportable(tmp_path / "a", replace(model, linears=model.linears | {path: changed}))
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.\w_proj.*one layer of one scheme"):
        export_vllm(tmp_path / "a", tmp_path / "out", VllmOptions())
    alone = "model.layers.1.mlp.down_proj"
    shape = model.config.linear_shapes()[alone]
    changed = random_linear(shape.out_features, shape.in_features, other, torch.Generator())
    write_exportable(tmp_path / "b", replace(model, linears=model.linears | {alone: changed}))
    worst = export_vllm(tmp_path / "b", tmp_path / "out", VllmOptions()).worst_weight_error
    assert worst is not None
    assert worst < 1e-7


def test_proof_notices_a_changed_file_and_another_artifact(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4))
    write_exportable(tmp_path / "other", exportable(LinearKind(INT4, rank=2)))
    with pytest.raises(ExportError, match="is not the artifact"):
        verify_export(out, tmp_path / "other")
    (out / "notes.txt").write_text("x")
    with pytest.raises(ExportError, match=r"notes\.txt: was added"):
        verify_export(out)
    (out / "notes.txt").unlink()
    shard = out / "base" / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ExportError, match=r"00001-of-00003\.safetensors: has changed"):
        verify_export(out)


def test_proof_notices_weights_that_differ_under_right_hashes(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4))
    proof = json.loads((out / "verification.json").read_text())
    proof["reference_token_nlls"][5] += 0.5
    (out / "verification.json").write_text(json.dumps(proof))
    with pytest.raises(ExportError, match="differs by 5"):
        verify_export(out)


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4))
    with pytest.raises(ExportError, match="exists already"):
        export_vllm(tmp_path / "artifact", out, VllmOptions())
    export_vllm(tmp_path / "artifact", out, VllmOptions(), overwrite=True)
    with pytest.raises(ExportError, match="is no export"):
        export_vllm(tmp_path / "artifact", tmp_path / "artifact", VllmOptions(), overwrite=True)
