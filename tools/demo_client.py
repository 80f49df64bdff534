"""A minimal HTTP client for the demo: standard library only, so it measures the server and not a client package."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

SSE_PREFIX = "data: "
SSE_END = "[DONE]"


class DemoError(Exception):
    """A step of the demo failed; the message says which, and what was seen."""


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One streamed answer. ``tokens_per_second`` is the pace after the first token; None for a one-token answer."""

    text: str
    num_tokens: int
    ttft_seconds: float
    tokens_per_second: float | None


class Client:
    """Talks to one server on this machine."""

    def __init__(self, host: str, port: int, timeout_seconds: float = 300.0) -> None:
        self.url = f"http://{host}:{port}"
        self._host = host
        self._port = port
        self._timeout_seconds = timeout_seconds

    def is_ready(self) -> bool:
        """Whether the server answers its readiness probe with success."""
        try:
            with closing(HTTPConnection(self._host, self._port, timeout=5)) as connection:
                connection.request("GET", "/health/ready")
                return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False

    def model_name(self) -> str:
        """Name of the model that the server offers."""
        with self._open("/v1/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def metric(self, name: str) -> float:
        """Value of one metric without labels."""
        with self._open("/metrics") as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise DemoError(f"/metrics has no {name}")

    def perplexity(self, model: str, text: str) -> dict[str, Any]:
        """Body of ``POST /v1/perplexity`` for ``text``.

        Raises:
            DemoError: the perplexity is too large for a number.
        """
        with self._open("/v1/perplexity", {"model": model, "text": text}) as response:
            body: dict[str, Any] = json.load(response)
        if body["perplexity"] is None:
            raise DemoError(f"the perplexity request was answered with no finite number: {body}")
        return body

    def chat(self, model: str, question: str, max_tokens: int) -> ChatResult:
        """Ask one question, reading the answer as it streams.

        Raises:
            DemoError: the stream reports an error, has no text, or ends without its closing event.
        """
        payload = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        pieces: list[tuple[float, str]] = []
        num_tokens = 0
        started = time.perf_counter()
        with self._open("/v1/chat/completions", payload) as response:
            for event in read_events(response):
                if text := _delta_text(event):
                    pieces.append((time.perf_counter(), text))
                if usage := event.get("usage"):
                    num_tokens = int(usage["completion_tokens"])
        if not pieces:
            raise DemoError("the chat request was answered with no text")
        first, last = pieces[0][0], pieces[-1][0]
        pace = (num_tokens - 1) / (last - first) if num_tokens > 1 and last > first else None
        return ChatResult("".join(text for _, text in pieces), num_tokens, first - started, pace)

    @contextmanager
    def _open(self, path: str, payload: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        body = None if payload is None else json.dumps(payload)
        method = "GET" if payload is None else "POST"
        with closing(HTTPConnection(self._host, self._port, timeout=self._timeout_seconds)) as connection:
            try:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                if response.status != HTTPStatus.OK:
                    raise DemoError(f"{path} answered {response.status}: {response.read().decode(errors='replace')}")
                yield response
            except (OSError, HTTPException) as error:
                raise DemoError(f"{path}: the connection failed ({error})") from error


def read_events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON bodies of a server-sent event stream up to its closing event."""
    for raw in response:
        line = raw.decode().rstrip("\r\n")
        if not line.startswith(SSE_PREFIX):
            continue
        data = line.removeprefix(SSE_PREFIX)
        if data == SSE_END:
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise DemoError(f"the stream reports an error: {event['error']}")
        yield event
    raise DemoError("the stream ended without its closing event")


def _delta_text(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
