"""Log lines for people or as JSON objects, written by a thread of their own: a full disk, a closed stream or a reader
that has stopped costs lines, never a request."""

import json
import logging
import logging.handlers
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
STDERR = 2
MAX_WAITING_LINES = 10_000


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and a request's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of ``record``."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": "request" if fields else record.getMessage(),
            **fields,
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class DescriptorHandler(logging.Handler):
    """Writes lines straight to a file descriptor: nothing stays in a buffer that would fail once more at exit."""

    def __init__(self, descriptor: int = STDERR) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or lose it."""
        try:
            data = (self.format(record) + "\n").encode("utf-8", errors="backslashreplace")
            while data:
                data = data[os.write(self._descriptor, data) :]
        except Exception:  # no log is a reason to fail, and there is no place left to say so
            return


class DroppingQueueHandler(logging.handlers.QueueHandler):
    """Passes lines on to the thread that writes them, and drops them when too many wait.

    A ``SimpleQueue``, since a signal handler that logs may interrupt a line of the same thread: it has no lock to wait
    for.
    """

    def __init__(self, lines: "queue.SimpleQueue[logging.LogRecord]", max_waiting: int = MAX_WAITING_LINES) -> None:
        super().__init__(lines)
        self._lines = lines
        self._max_waiting = max_waiting

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never waits."""
        if self._lines.qsize() < self._max_waiting:
            self._lines.put(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record as it is: it stays in this process, and the formatter wants its traceback."""
        return record


@contextmanager
def logging_to_stderr(level: str, log_format: str) -> Iterator[None]:
    """Log everything from ``level`` on to standard error as long as the context.

    log_format: text or json
    """
    writer = DescriptorHandler()
    writer.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener, handler = logging.handlers.QueueListener(lines, writer), DroppingQueueHandler(lines)
    root = logging.getLogger()
    level_before = root.level
    root.addHandler(handler)
    root.setLevel(level.upper())
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level_before)
        listener.stop()
