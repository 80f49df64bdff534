"""The engine behind a real uvicorn on a local port: the same requests, streamed by a client process."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models.artifact.load import LoadedModel
from models.bench.probe import TOKENS_PER_SECOND, Probe, ProbeError
from models.bench.report import HTTP
from models.bench.worker import Worker
from models.bench.workload import Workload

from ..app import create_app
from ..listener import bind
from ..metrics import Metrics
from ..server import DrainingServer
from ..settings import Settings

_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 60.0


def http_metric(num_sequences: int) -> str:
    """Metric of ``num_sequences`` streams at a time."""
    return f"{num_sequences} streams, {HTTP}"


@contextmanager
def http_probe(
    loaded: LoadedModel,
    workload: Workload,
    num_sequences: int,
    new_metrics: Callable[[str, int], Metrics] = Metrics,
) -> Iterator[Probe]:
    """A server for ``loaded`` and its client, up as long as the context; ``new_metrics`` as for ``create_app``.

    Raises:
        ProbeError: one of them does not start.
    """
    settings = Settings(model_name="bench", max_num_seqs=num_sequences, max_num_batched_tokens=None, api_key=None)
    app = create_app(loaded, settings, new_metrics=new_metrics)
    vocab_size = loaded.model.config.vocab_size
    script = str(Path(__file__).with_name("http_client.py"))
    with bind(_HOST, 0) as listener, Worker("the HTTP client", [sys.executable, script]) as client:
        server = DrainingServer(app, log_level="warning")
        thread = threading.Thread(target=lambda: _serve(server, listener), daemon=True)
        thread.start()
        try:
            _wait_for_start(server, thread)
            port = listener.getsockname()[1]
            generator = torch.Generator().manual_seed(0)

            def run() -> tuple[float]:
                prompts = torch.randint(vocab_size, (num_sequences, workload.prompt_len), generator=generator)
                common = {"max_tokens": workload.num_steps, "temperature": 0, "ignore_eos": True}
                answer = client.ask(
                    host=_HOST, port=port, bodies=[{**common, "prompt": row} for row in prompts.tolist()]
                )
                if answer["num_tokens"] != num_sequences * workload.num_steps:
                    raise ProbeError(f"the server gave {answer['num_tokens']} tokens")
                return (answer["num_tokens"] / answer["seconds"],)

            yield Probe((http_metric(num_sequences),), TOKENS_PER_SECOND, run)
        finally:
            server.should_exit = True
            thread.join(_PATIENCE_SECONDS)


def _serve(server: DrainingServer, listener: socket.socket) -> None:
    """On the event loop that ``qerve serve`` runs on."""
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))


def _wait_for_start(server: DrainingServer, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ProbeError("the HTTP server did not start")
        time.sleep(0.01)
