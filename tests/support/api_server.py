"""An application behind a real uvicorn on a free port, in a thread of the test process."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from models.artifact.load import LoadedModel
from service.app import create_app
from service.deps import Context
from service.listener import bind, url_of
from service.server import DrainingServer
from service.settings import Settings
from tests.support.fake_model import FakeParts

PATIENCE_SECONDS = 20.0


@dataclass
class LiveServer:
    """A running server and a way into its parts."""

    url: str
    app: FastAPI
    server: DrainingServer
    client: httpx.Client

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.client.post(path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The JSON events of a stream; the last line must be the end mark."""
        response = self.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def metric(self, name: str, **labels: str) -> float | None:
        """Sum of the samples of ``name`` that carry ``labels``; None: there is no such sample."""
        found = [
            sample.value
            for family in self.context.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def raw(self, data: bytes, close_writing: bool = False) -> bytes:
        """What the server answers to ``data`` on a connection of its own."""
        with socket.create_connection(self.address, timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(data)
            if close_writing:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            return answer


def wait_until(condition: Callable[[], bool]) -> None:
    """Give the server's threads time to get there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.005)


@contextmanager
def live_server(parts: FakeParts | None = None, **settings: Any) -> Iterator[LiveServer]:
    """Serve the fake model."""
    options = {"model_name": "fake", "kv_cache_memory": "16KiB", "max_num_seqs": 4, **settings}
    with live_loaded_server((parts or FakeParts()).loaded(), **options) as live:
        yield live


@contextmanager
def live_loaded_server(loaded: LoadedModel, **settings: Any) -> Iterator[LiveServer]:
    """Serve ``loaded``; shut down properly at the end."""
    app = create_app(loaded, Settings(**settings))
    with bind("127.0.0.1", 0) as listener:
        server = DrainingServer(app, log_level="warning")
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            with httpx.Client(base_url=url_of(listener), timeout=PATIENCE_SECONDS, trust_env=False) as client:
                yield LiveServer(url_of(listener), app, server, client)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
