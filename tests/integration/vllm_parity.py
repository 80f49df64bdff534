"""An export in vLLM beside its artifact here: greedy texts, log-probabilities, perplexity.

    python -m tests.integration.vllm_parity ARTIFACT EXPORT --vllm PATH/TO/vllm --text wiki.test.raw
    python -m tests.integration.vllm_parity ARTIFACT EXPORT --url http://127.0.0.1:8000 --text wiki.test.raw

The first line starts ``vllm serve`` as the export's README has it, on a free port; the second takes a server that runs.
Ours runs in float32 with inputs unquantized. Prints a table for people and one JSON line last; exit status 1 where the
two differ by more than float16 explains.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.artifact.load import load_artifact
from models.evaluate.generate import generate_greedily
from models.evaluate.perplexity import score_window
from models.llama.network import Network

MAX_LOGPROB_DIFFERENCE = 0.05
MAX_PERPLEXITY_RATIO = 1.005
NEW_TOKENS = 24
START_SECONDS = 1800
PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "Once upon a time, there was a",
    "The three primary colours are", "In 1969, the first man", "To make bread you need", "The sun rises in the",
    "A triangle has three", "The largest ocean on Earth is", "Shakespeare wrote", "The chemical symbol of gold is",
    "def fibonacci(n):", "My favourite season is", "The opposite of hot is", "Photosynthesis is the process",
    "She opened the door and", "The speed of light is", "An apple a day", "The history of Rome begins",
    "Dear Sir or Madam,",
)  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """What the comparison came to; nll in nats per token.

    num_equal_texts:        greedy continuations of ``PROMPTS`` that are equal to the last token
    first_differences:      where others part: prompt, position, and by how many nats ours prefers its own token there
    max_logprob_difference: over the tokens of the text
    uncorrected_nll:        of the base without its adapter; None: there is none
    """

    num_prompts: int
    num_equal_texts: int
    first_differences: list[dict[str, Any]]
    max_logprob_difference: float
    nll: float
    vllm_nll: float
    perplexity_ratio: float
    uncorrected_nll: float | None
    num_tokens: int

    @property
    def holds(self) -> bool:
        """Equal but for the rounding of float16: texts part only where two tokens are about equally likely."""
        ratio = max(self.perplexity_ratio, 1 / self.perplexity_ratio)
        are_ties = all(it["margin"] < MAX_LOGPROB_DIFFERENCE for it in self.first_differences)
        return self.max_logprob_difference < MAX_LOGPROB_DIFFERENCE and ratio < MAX_PERPLEXITY_RATIO and are_ties


class Client:
    """vLLM over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"{self._url}/v1/models", timeout=60) as answer:
            return [it["id"] for it in json.load(answer)["data"]]

    def complete(self, model: str, prompts: Sequence[Sequence[int]], **options: Any) -> list[dict[str, Any]]:
        body = json.dumps({"model": model, "prompt": [list(it) for it in prompts], "temperature": 0, **options})
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/v1/completions", body.encode(), header)
        with urllib.request.urlopen(request, timeout=1800) as answer:
            return sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])

    def generate(self, model: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        choices = self.complete(model, prompts, max_tokens=NEW_TOKENS, return_token_ids=True, ignore_eos=True)
        return [list(choice["token_ids"]) for choice in choices]

    def nlls(self, model: str, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        """nll of every token of ``windows`` but their first, one after the other."""
        choices = self.complete(model, windows, max_tokens=1, prompt_logprobs=0)
        logprobs = [
            row[str(token)]["logprob"]
            for choice, window in zip(choices, windows, strict=True)
            for row, token in zip(choice["prompt_logprobs"][1:], window[1:], strict=True)
        ]
        return -torch.tensor(logprobs)


def names(export: Path, client: Client) -> tuple[str, str | None]:
    """Names of the corrected model, and of the uncorrected one beside it."""
    served = client.models()
    if not (export / "adapter").is_dir():
        return served[0], None
    uncorrected = next(name for name in served if name.endswith("-uncorrected"))
    return uncorrected.removesuffix("-uncorrected"), uncorrected


def compare(artifact: Path, export: Path, client: Client, text: str, window: int, num_windows: int) -> Parity:
    loaded = load_artifact(artifact, dtype=torch.float32, backend="dequantized")
    model, tokenizer = loaded.model, loaded.tokenizer
    name, uncorrected = names(export, client)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    theirs = client.generate(name, prompts)
    ours = [generate_greedily(model, ids, NEW_TOKENS, lambda _: False) for ids in prompts]
    differences = [parting(model, *it) for it in zip(prompts, ours, theirs, strict=True) if it[1] != it[2]]
    tokens = tokenizer.encode(text)[: window * num_windows]
    windows = [tokens[start : start + window] for start in range(0, len(tokens) - 1, window)]
    expected = torch.cat([score_window(model, torch.tensor(it), len(it) - 1) for it in windows])
    found = client.nlls(name, windows)
    without = None if uncorrected is None else client.nlls(uncorrected, windows)
    return Parity(
        num_prompts=len(PROMPTS),
        num_equal_texts=len(PROMPTS) - len(differences),
        first_differences=differences,
        max_logprob_difference=float((expected - found).abs().max()),
        nll=float(expected.double().mean()),
        vllm_nll=float(found.double().mean()),
        perplexity_ratio=float((found.double().mean() - expected.double().mean()).exp()),
        uncorrected_nll=None if without is None else float(without.double().mean()),
        num_tokens=len(expected),
    )


def parting(model: Network, prompt: list[int], ours: list[int], theirs: list[int]) -> dict[str, Any]:
    """Where two continuations of a prompt part, and by how many nats we prefer ours there."""
    at = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
    nlls = [float(score_window(model, torch.tensor([*prompt, *ours[:at], it[at]]), 1)[0]) for it in (ours, theirs)]
    return {"prompt": prompt, "position": at, "margin": nlls[1] - nlls[0]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def vllm_server(executable: str, export: Path, log: Path) -> Iterator[str]:
    """``vllm serve`` of the export, with the options of its README; ends with the block."""
    port = free_port()
    dtype = json.loads((export / "base" / "config.json").read_text())["dtype"]
    command = [executable, "serve", str(export / "base"), "--dtype", dtype, "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "32", "--served-model-name"]
    config = export / "adapter" / "adapter_config.json"
    if config.is_file():
        adapter = {"name": "export", "path": str(export / "adapter"), "base_model_name": "export-uncorrected"}
        rank = str(json.loads(config.read_text())["r"])
        command += ["export-uncorrected", "--enable-lora", "--max-lora-rank", rank, "--max-loras", "1"]
        command += ["--lora-modules", json.dumps(adapter)]
    else:
        command.append("export")
    own = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own session: the server and its workers, nothing else
        process.wait(60)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm ended with status {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise RuntimeError(f"vllm was not ready after {START_SECONDS} s: {log.read_text()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vllm", help="the command of the environment that has vLLM")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=8)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    arguments = (text, options.window, options.max_windows)
    if options.url:
        result = compare(options.artifact, options.export, Client(options.url), *arguments)
    else:
        with vllm_server(options.vllm or "vllm", options.export, options.log) as url:
            result = compare(options.artifact, options.export, Client(url), *arguments)
    for name, value in asdict(result).items():
        print(f"{name:24} {value}")
    print(json.dumps(asdict(result) | {"holds": result.holds}))
    return 0 if result.holds else 1


if __name__ == "__main__":
    sys.exit(main())
