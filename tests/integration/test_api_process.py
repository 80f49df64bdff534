"""``qerve serve`` as an operator runs it: a process, an artifact on disk, a signal."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def artifact(tmp_path):
    directory = tmp_path / "tiny-w4"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    return directory


def test_an_artifact_is_served_until_the_process_is_told_to_stop(artifact):
    command = [sys.executable, "-c", "from service.cli import main; main()", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(r"Serving tiny-w4 on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", line)
            assert match, line + process.stderr.read()
            with httpx.Client(base_url=match[1], trust_env=False, timeout=20) as client:
                assert client.get("/health/ready").status_code == 200
                body = {"model": "tiny-w4", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
        log = process.stderr.read()
    assert "SIGTERM: no new requests" in log
    assert "Traceback" not in log
