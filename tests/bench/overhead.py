"""What a decode step costs besides the model: eight streams from a real server whose model returns constant logits.

    python -m tests.bench.overhead artifacts/demo

The tokenizer and the size of the vocabulary are the artifact's. The client is a process of its own on the same machine.
"""

import dataclasses
import gc
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from models.artifact.load import LoadedModel, load_artifact
from models.bench.probe import Probe
from models.bench.workload import Workload
from models.llama.batch import TokenBatch
from models.llama.network import Network
from service.bench.http import http_probe

NUM_STREAMS = 8
STEPS = 200
ROUNDS = 5


class ConstantModel:
    """Takes the place of a network: its caches and its shape, and always the same logits."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._logits = torch.randn(NUM_STREAMS, network.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def step(self, tokens: TokenBatch, kv_cache: Any) -> Tensor | None:
        """Nothing is computed."""
        return self._logits[: len(tokens.logit_rows)] if tokens.logit_rows else None


def main(artifact: Annotated[Path, typer.Argument(help="Artifact whose tokenizer and vocabulary are used.")]) -> None:
    """Print milliseconds of a step, median of the rounds."""
    loaded: LoadedModel = load_artifact(artifact)
    constant: Any = ConstantModel(loaded.model)
    workload = Workload(prompt_len=16, num_steps=STEPS)
    gc.collect()
    gc.freeze()  # as the server does when it has loaded
    with http_probe(dataclasses.replace(loaded, model=constant), workload, NUM_STREAMS) as probe:
        probe.run()
        rounds = [measure(probe) for _ in range(ROUNDS)]
    for name, steps in zip(("from request to answer", "of processor time"), zip(*rounds, strict=True), strict=True):
        shown = ", ".join(f"{step:.3f}" for step in sorted(steps))
        print(f"{median(steps):.3f} ms a step of {NUM_STREAMS} streams, {name} (rounds: {shown})")


def measure(probe: Probe) -> tuple[float, float]:
    """Milliseconds of a step: by the clock at the client's side, and of processor time in the server's process."""
    before = time.process_time()
    (tokens_per_second,) = probe.run()
    busy = time.process_time() - before
    return NUM_STREAMS * 1000 / tokens_per_second, busy * 1000 / STEPS


if __name__ == "__main__":
    typer.run(main)
