"""A helper process that is asked over its standard input and answers on its standard output, a JSON object per line.

It lives as long as the bench, so that nothing is loaded twice, and must rest while nothing is asked of it: a worker
whose threads spin would take the processor from what is measured in the meantime.
"""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from ..closing import Closing
from .probe import ProbeError

_WINDOW_SECONDS = 0.03
_IDLE_SHARE = 0.1
_TAIL_LINES = 3


class WorkerError(ProbeError):
    """The worker ended, did not answer, or says that it cannot do what it was asked."""


class Worker(Closing):
    """A child process.

    Args:
        name: what messages call it.
        command: its command line.
        without: environment variables that it does not inherit.
        timeout_seconds: the longest that an answer may take.
    """

    def __init__(
        self, name: str, command: Sequence[str], without: Sequence[str] = (), timeout_seconds: float = 900.0
    ) -> None:
        self.name = name
        self._timeout_seconds = timeout_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed in close()
        environment = {key: value for key, value in os.environ.items() if key not in without}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        try:
            self._process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{name} cannot be started: {error}") from error

    def ask(self, **request: Any) -> Mapping[str, Any]:
        """The answer to ``request``.

        Raises:
            WorkerError: there is none, with what the process said last.
        """
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        if not select.select([self._process.stdout], [], [], self._timeout_seconds)[0]:
            self.close()
            raise WorkerError(f"{self.name} did not answer within {self._timeout_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def wait_until_idle(self, patience_seconds: float = 2.0) -> None:
        """Return once its threads sleep.

        Raises:
            WorkerError: they go on using the processor.
        """
        deadline = time.monotonic() + patience_seconds
        while (share := self._processor_share()) > _IDLE_SHARE:
            if time.monotonic() > deadline:
                raise WorkerError(f"{self.name} uses {share:.0%} of a processor while it has nothing to do")

    def close(self) -> None:
        """End the process; twice does no harm."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close()
            except OSError:  # a request that was never read
                continue

    def _processor_share(self) -> float:
        try:
            process = psutil.Process(self._process.pid)
            before = sum(process.cpu_times()[:2])
            time.sleep(_WINDOW_SECONDS)
            return (sum(process.cpu_times()[:2]) - before) / _WINDOW_SECONDS
        except psutil.Error:
            return 0.0  # it has ended: the next question will tell

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        said = f"; it said last: {' / '.join(tail)}" if tail else ""
        return WorkerError(f"{self.name} ended with {_status_text(status)}{said}")


def _status_text(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
