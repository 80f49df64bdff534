"""vLLM runs an export of a real artifact, unmodified: only where ``QERVE_VLLM`` names its command."""

import os
from pathlib import Path

import pytest

from models.build import build_artifact
from models.config import BuildConfig
from models.export.vllm import VllmOptions, export_vllm
from models.llama.checkpoint import open_checkpoint
from tests.integration.vllm_parity import Client, compare, run_here, vllm_server, wait_until_ready

VLLM = os.environ.get("QERVE_VLLM")
SETTINGS = {
    "scheme": {"group_size": 64},
    "reconstruct": {"method": "lqer", "rank": 32},
    "calibration": {"source": "none"},
}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(VLLM is None, reason="QERVE_VLLM names no vllm command")
def test_vllm_says_what_we_say(smollm2_gguf: Path, shared_data: Path, tmp_path: Path) -> None:
    artifact, export = tmp_path / "artifact", tmp_path / "export"
    build_artifact(open_checkpoint(str(smollm2_gguf)), artifact, BuildConfig.from_dict(SETTINGS, "test"))
    export_vllm(artifact, export, VllmOptions())
    text = (shared_data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    with vllm_server(VLLM or "vllm", export, tmp_path / "vllm.log") as url:
        ours = run_here(artifact, text, window=512, num_windows=4, new_tokens=24)
        wait_until_ready(url, tmp_path / "vllm.log")
        result = compare(ours, export, Client(url))
    assert result.holds, result
    assert result.num_equal_texts >= result.num_prompts - 2
    assert result.uncorrected_nll is not None
    assert result.uncorrected_nll > result.vllm_nll + 0.01
