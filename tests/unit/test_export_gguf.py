"""``qerve export gguf``: what is written, read back by the ``gguf`` package, and run by llama.cpp where it is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from models.errors import ExportError
from models.export.gguf import GgufOptions, export_gguf
from models.export.gguf_tokenizer import tokenizer_metadata
from models.export.verify import verify_export
from models.llama.config_fields import ConfigFields
from models.llama.gguf import GgufCheckpoint
from models.llama.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer_files
from models.scheme import PER_CHANNEL, QuantScheme
from tests.support.artifact_builder import LinearKind
from tests.support.exports import exportable, write_exportable
from tests.support.tiny_checkpoints import CORPUS, VOCAB_SIZE, tokenizer_files
from tests.support.tiny_gguf import byte_level_metadata, permute

INT4 = QuantScheme(4, 32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_PYTHON = os.environ.get("QERVE_LLAMA_PYTHON")
"""An interpreter that has llama-cpp-python."""

RUN_LLAMA = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, adapter, ids = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
llm = Llama(model, lora_path=adapter, n_ctx=len(ids) + 8, logits_all=True, verbose=False, n_threads=1)
llm.eval(ids)
rows = np.array(llm._scores[: len(ids)], dtype=np.float64)
logprobs = rows - np.logaddexp.reduce(rows, axis=1)[:, None]
text = llm.tokenize(sys.argv[4].encode(), add_bos=False, special=False)
print(json.dumps({"nlls": [-logprobs[i, ids[i + 1]] for i in range(len(ids) - 1)], "tokens": text}))
"""


def export(directory: Path, kind: LinearKind, options: GgufOptions | None = None, **changes: Any) -> Path:
    write_exportable(directory / "artifact", exportable(kind, **changes))
    result = export_gguf(directory / "artifact", directory / "out", options or GgufOptions())
    assert result.worst_weight_error is not None
    assert result.worst_weight_error < 1e-7
    assert verify_export(directory / "out").max_nll_difference < 1e-3
    return directory / "out"


@pytest.mark.parametrize(
    ("kind", "changes", "stored"),
    [
        (LinearKind(INT4, rank=9), {}, "Q5_0"),
        (LinearKind(QuantScheme(4, 64, is_symmetric=True)), {}, "Q4_0"),
        (LinearKind(QuantScheme(8, PER_CHANNEL, is_symmetric=True)), {"rope_scaling": LLAMA3}, "Q8_0"),
        (LinearKind(QuantScheme(3, PER_CHANNEL), form="single-factor", has_channel_order=True), {}, "Q4_0"),
        (LinearKind(INT4), {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Q5_0"),
        (LinearKind(INT4, has_bias=True), {"attention_bias": True, "mlp_bias": True}, "Q5_0"),
    ],
)
def test_codes_go_over_exactly(tmp_path: Path, kind: LinearKind, changes: dict[str, Any], stored: str) -> None:
    out = export(tmp_path, kind, **changes)
    tensors = {it.name: it for it in gguf.GGUFReader(out / "model.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == stored


def test_adapter_has_the_names_and_metadata_that_llama_cpp_reads(tmp_path: Path) -> None:
    write_exportable(tmp_path / "artifact", model := exportable(LinearKind(INT4, rank=6)))
    export_gguf(tmp_path / "artifact", tmp_path / "out", GgufOptions())
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: reader.fields[name].contents() for name in ("general.architecture", "general.type", "adapter.type")}
    assert fields == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert reader.fields["adapter.lora.alpha"].contents() == 6
    tensors = {it.name: it.data for it in reader.tensors}
    weights = model.linears["model.layers.1.self_attn.q_proj"]
    assert weights.correction is not None
    up, down = weights.correction.lora_up, weights.correction.lora_down
    assert isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_a"], down.float().numpy())
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], permute(up.float().numpy(), 2))


@pytest.mark.parametrize(
    ("kind", "options", "least", "most"),
    [
        (LinearKind(INT4), GgufOptions("q4_1"), 1e-6, 1e-3),
        (LinearKind(INT4, rotation_block=16), GgufOptions(), 1e-4, 2e-2),
        (LinearKind(INT4), GgufOptions(merge=True), 1e-4, 2e-2),
        (LinearKind(QuantScheme(format="nf4", group_size=32)), GgufOptions("f16"), 1e-6, 1e-3),
    ],
)
def test_what_is_rounded_is_said_and_measured(
    tmp_path: Path, kind: LinearKind, options: GgufOptions, least: float, most: float
) -> None:
    write_exportable(tmp_path / "artifact", exportable(kind))
    result = export_gguf(tmp_path / "artifact", tmp_path / "out", options)
    assert result.worst_weight_error is not None
    assert least < result.worst_weight_error < most
    assert any("layers are rounded" in note for note in result.notes)
    assert (tmp_path / "out" / "adapter.gguf").exists() is not options.merge


def test_merging_into_few_bits_is_refused() -> None:
    with pytest.raises(ExportError, match="lose the correction"):
        GgufOptions("q4_0", merge=True)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokenizers_come_back_through_the_metadata(pre: str) -> None:
    files = build_tokenizer_files(ConfigFields(byte_level_metadata(pre=pre), "test"))
    metadata = tokenizer_metadata(files, VOCAB_SIZE, None, "test")
    again = build_tokenizer_files(ConfigFields(metadata, "test"))
    first, second = (tokenizers.Tokenizer.from_buffer(it["tokenizer.json"]) for it in (files, again))
    for text in (*CORPUS, "<|im_start|>a 1234567 b"):
        assert first.encode(text).ids == second.encode(text).ids
    names = ("bos_token", "eos_token", "chat_template")
    kept = [{name: json.loads(it["tokenizer_config.json"]).get(name) for name in names} for it in (files, again)]
    assert kept[0] == kept[1]


def test_sentencepiece_merges_in_the_same_order_after_scores_were_made_up() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0],
    }
    files = build_tokenizer_files(ConfigFields(metadata, "test"))
    written = tokenizer_metadata(files, len(pieces), None, "test")
    assert written["tokenizer.ggml.model"] == "llama"
    again = build_tokenizer_files(ConfigFields(written, "test"))
    first, second = (tokenizers.Tokenizer.from_buffer(it["tokenizer.json"]) for it in (files, again))
    for text in ("ab ab aab", "b a ü"):
        assert first.encode(text).ids == second.encode(text).ids


def test_unknown_ways_of_cutting_text_need_a_name(tmp_path: Path) -> None:
    content = json.loads(tokenizer_files()["tokenizer.json"])
    content["pre_tokenizer"] = {"type": "Whitespace"}
    files = {"tokenizer.json": json.dumps(content).encode()}
    with pytest.raises(ExportError, match="--pre-tokenizer"):
        tokenizer_metadata(files, VOCAB_SIZE, None, "somewhere")
    assert tokenizer_metadata(files, VOCAB_SIZE, "gpt-2", "somewhere")["tokenizer.ggml.pre"] == "gpt-2"


def test_settings_come_back(tmp_path: Path) -> None:
    out = export(tmp_path, LinearKind(INT4), rope_scaling=LLAMA3, tie_word_embeddings=True)
    config, original = (
        GgufCheckpoint(out / "model.gguf").config,
        exportable(LinearKind(INT4), rope_scaling=LLAMA3, tie_word_embeddings=True).config,
    )
    for name in ("rope", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, name) == getattr(original, name)


@pytest.mark.skipif(LLAMA_PYTHON is None, reason="QERVE_LLAMA_PYTHON names no interpreter with llama-cpp-python")
@pytest.mark.parametrize("merge", [False, True])
def test_llama_cpp_computes_the_same(tmp_path: Path, merge: bool) -> None:
    write_exportable(tmp_path / "artifact", exportable(LinearKind(INT4, rank=8)))
    export_gguf(tmp_path / "artifact", tmp_path / "out", GgufOptions(merge=merge, pre_tokenizer="gpt-2"))
    proof = json.loads((tmp_path / "out" / "verification.json").read_text())
    text = CORPUS[1]
    adapter = "" if merge else str(tmp_path / "out" / "adapter.gguf")
    arguments = [str(tmp_path / "out" / "model.gguf"), adapter, json.dumps(proof["token_ids"]), text]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [LLAMA_PYTHON or sys.executable, "-c", RUN_LLAMA, *arguments],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    found = json.loads(answer.stdout.splitlines()[-1])
    nlls, expected = np.array(found["nlls"]), np.array(proof["reference_token_nlls"])
    # llama.cpp rounds inputs to 8 bits in groups of 32, in a network whose logits reach 50.
    assert abs(nlls.mean() - expected.mean()) < 0.01 * expected.mean()
    assert np.corrcoef(nlls, expected)[0, 1] > 0.99
    assert found["tokens"] == tokenizers.Tokenizer.from_buffer(tokenizer_files()["tokenizer.json"]).encode(text).ids
