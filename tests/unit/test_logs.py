"""Log lines: their form, and that nothing that happens to them is a caller's trouble."""

import json
import logging
import os
import queue
import sys
import threading
from pathlib import Path

import pytest

from service.logs import DescriptorHandler, DroppingQueueHandler, JsonFormatter, logging_to_stderr


def record(message, *arguments, **fields):
    values = {"fields": fields} if fields else None
    return logging.getLogger("qerve.x").makeRecord(
        "qerve.x", logging.INFO, "f", 1, message, arguments, None, extra=values
    )


def test_a_json_line_has_time_level_logger_message_and_fields():
    line = JsonFormatter().format(record("hello %s", "ü\n"))
    values = json.loads(line)
    assert "\n" not in line
    assert (values["level"], values["logger"], values["message"]) == ("info", "qerve.x", "hello ü\n")
    assert values["time"].endswith("+00:00")
    assert json.loads(JsonFormatter().format(record("x", status=200)))["status"] == 200


def test_a_json_line_has_its_exception():
    item = record("failed")
    try:
        raise ValueError("the reason")
    except ValueError:
        item.exc_info = sys.exc_info()
    assert "ValueError: the reason" in json.loads(JsonFormatter().format(item))["exception"]


def test_a_descriptor_that_is_full_closed_or_broken_raises_nothing(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    DescriptorHandler(writing).emit(record("nobody reads this"))
    os.close(writing)
    DescriptorHandler(writing).emit(record("closed"))
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY)
        DescriptorHandler(full).emit(record("full"))
        os.close(full)


def test_lines_reach_their_descriptor_whole(tmp_path):
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    handler = DescriptorHandler(descriptor)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.emit(record("x" * 100_000 + "\udc80"))
    os.close(descriptor)
    assert path.read_text() == "x" * 100_000 + "\\udc80\n"


def test_when_nobody_writes_lines_are_dropped_and_nobody_waits():
    lines = queue.SimpleQueue()
    handler = DroppingQueueHandler(lines, max_waiting=3)
    for _ in range(10):
        handler.handle(record("x"))
    assert lines.qsize() == 3


def test_a_writer_that_blocks_delays_nobody():
    """A pipe whose reader has stopped: the writing thread stands still, the logging ones do not."""
    reading, writing = os.pipe()
    lines = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, DescriptorHandler(writing))
    listener.start()
    handler = DroppingQueueHandler(lines, max_waiting=10)
    for _ in range(200):
        handler.handle(record("x" * 10_000))
    assert lines.qsize() <= 10
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 20), b"")])
    drain.start()
    listener.stop()
    os.close(writing)
    drain.join()
    os.close(reading)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_standard_error_gets_the_lines_from_the_level_on(capfd, log_format):
    with logging_to_stderr("warning", log_format):
        logging.getLogger("qerve.x").info("not this")
        logging.getLogger("qerve.x").warning("but this")
    written = capfd.readouterr().err
    assert "not this" not in written
    assert "but this" in written
    assert written.startswith("{") == (log_format == "json")


def test_logging_is_as_before_afterwards():
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with logging_to_stderr("debug", "text"):
        pass
    assert (root.level, root.handlers) == before
