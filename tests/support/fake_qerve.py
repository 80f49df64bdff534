"""A stand-in for the ``qerve`` command: writes a manifest on ``build``, answers fixed words on ``serve``.

Run as a script. ``QERVE_FAKE`` selects a fault: build-fails, dies-early, no-text, stream-error, cut-stream, chat-500.
"""

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WORDS = ("The", " sky", " scatters", " blue", " light.")
REPORT = {
    "seconds": 12.0,
    "peak_memory_bytes": 300 << 20,
    "memory_bound_bytes": 400 << 20,
    "preparation_peak_bytes": 1 << 20,
}
MANIFEST = {
    "effective_bits": 5.125,
    "dense_bytes": 1 << 20,
    "evaluation": {"dense_perplexity": 20.25, "quantized_perplexity": 21.5},
}


class Handler(BaseHTTPRequestHandler):
    """Just the routes that the demo calls."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Probe, model list, metrics."""
        answers = {
            "/health/ready": "{}",
            "/v1/models": json.dumps({"data": [{"id": "fake-model"}]}),
            "/metrics": "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes 2.097152e+08\n",
        }
        self._answer(200 if self.path in answers else 404, answers.get(self.path, ""))

    def do_POST(self) -> None:
        """A perplexity result, or a stream of words."""
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/perplexity":
            self._answer(
                200, json.dumps({"perplexity": 17.75, "nll": 2.876, "num_tokens": len(payload["text"].split())})
            )
        elif fault() == "chat-500":
            self._answer(500, json.dumps({"error": {"message": "out of luck"}}))
        else:
            self._stream()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if fault() == "stream-error":
            self._event({"error": {"message": "lost my thread"}})
        for word in () if fault() == "no-text" else WORDS:
            self._event({"choices": [{"delta": {"content": word}}]})
        self._chunk(": a comment that keeps the connection open\n\n")
        self._event({"choices": [], "usage": {"completion_tokens": len(WORDS)}})
        if fault() != "cut-stream":
            self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _event(self, body: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(body)}\n\n")

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


def fault() -> str:
    """The fault asked for."""
    return os.environ.get("QERVE_FAKE", "")


def option(arguments: list[str], name: str) -> str:
    """Value that follows ``name``."""
    return arguments[arguments.index(name) + 1]


def build(arguments: list[str]) -> int:
    """Write an artifact directory and the report."""
    if fault() == "build-fails":
        return 3
    out = Path(option(arguments, "--out"))
    out.mkdir(parents=True)
    (out / "quantization.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    Path(option(arguments, "--json-report")).write_text(json.dumps(REPORT), encoding="utf-8")
    return 0


def serve(arguments: list[str]) -> int:
    """Serve until terminated."""
    if fault() == "dies-early":
        print("no such tensor: everything is lost")
        return 4
    server = ThreadingHTTPServer((option(arguments, "--host"), int(option(arguments, "--port"))), Handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit({"build": build, "serve": serve}[sys.argv[1]](sys.argv[2:]))
