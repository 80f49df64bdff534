"""Streams completions from a server as fast as they come: a process of its own, so that it shares no lock with it.

Reads one JSON object per line and answers each with one line, see ``main``. Only the standard library: a client that
parsed every event would be measured too.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

_END = b"data: [DONE]"


async def stream(host: str, port: int, body: dict[str, Any]) -> int:
    """One streamed completion: the number of its tokens, as the server counts them.

    Raises:
        ValueError: the answer is not a whole stream.
    """
    reader, writer = await asyncio.open_connection(host, port)
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    return num_tokens_of(answer)


def num_tokens_of(answer: bytes) -> int:
    """Tokens of a whole streamed answer, head included.

    Raises:
        ValueError: it is an error, or was cut off.
    """
    head, _, content = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].decode(errors="replace")
    if " 200 " not in f"{status} ":
        raise ValueError(f"{status}: {content[:300].decode(errors='replace')}")
    if _END not in content:
        raise ValueError(f"the stream was cut off after {len(content)} bytes")
    events = [line.removeprefix(b"data: ") for line in content.splitlines() if line.startswith(b"data: {")]
    usage = json.loads(events[-1]).get("usage") or {}
    return int(usage["completion_tokens"])


async def stream_all(host: str, port: int, bodies: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Tokens of all streams together, and the seconds from the first request to the last byte."""
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream(host, port, body) for body in bodies))
    return sum(counts), time.perf_counter() - started


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            num_tokens, seconds = asyncio.run(stream_all(request["host"], request["port"], request["bodies"]))
            answer: dict[str, Any] = {"num_tokens": num_tokens, "seconds": seconds}
        except (OSError, ValueError, KeyError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
