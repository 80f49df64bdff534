"""The engine's thread, and the asyncio side that talks to it.

One thread owns the engine: requests and aborts reach it through an inbox, outputs go back to the event loop in one hop
per step.
Admission is counted on the event loop, before any work is done for a call, and given back exactly once.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from .engine import Engine, RequestOutput
from .request import FinishReason, Request

logger = logging.getLogger("qerve.engine")


class QueueFullError(Exception):
    """As many sequences are admitted as the queue takes."""


class DrainingError(Exception):
    """The server is shutting down and takes no new work."""


class Generation:
    """One call's share of the engine: its seats, and the outputs of its requests as they come.

    Whoever gets one from ``AsyncEngine.admit`` closes it; closing aborts what is unfinished.

    keeps_seats: a request's end does not free its seat: the next one of the same call takes it
    """

    def __init__(self, engine: "AsyncEngine", num_sequences: int, keeps_seats: bool) -> None:
        self.arrival_seconds = engine.clock()
        self._engine = engine
        self._num_seats = num_sequences
        self._keeps_seats = keeps_seats
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._unfinished: set[str] = set()

    @property
    def is_finished(self) -> bool:
        """Every request that was started has its last output."""
        return not self._unfinished

    def start(self, requests: Sequence[Request]) -> None:
        """Hand ``requests`` to the engine, at most one per seat that is free."""
        self._unfinished |= {request.request_id for request in requests}
        self._engine.add(self, requests)

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Outputs of all requests, in the order the engine made them, until the last one of each."""
        while not (self.is_finished and self._outputs.empty()):
            yield await self._outputs.get()

    def deliver(self, output: RequestOutput) -> None:
        """Take an output from the engine; a request's last one frees its seat even if nobody reads it."""
        self._outputs.put_nowait(output)
        if output.finish_reason is not None:
            self._unfinished.discard(output.request_id)
            if not self._keeps_seats:
                self._release(1)

    def close(self) -> None:
        """Abort what is unfinished and give the seats back; once is enough, twice does no harm."""
        self._engine.abort(self._unfinished)
        self._unfinished = set()
        self._release(self._num_seats)

    def _release(self, num_seats: int) -> None:
        self._num_seats -= num_seats
        self._engine.release(num_seats)


class AsyncEngine:
    """An ``Engine`` in its own thread.

    capacity: sequences admitted at the same time, running and waiting together
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.capacity = capacity
        self.clock = engine.clock
        self.is_draining = False
        self._engine = engine
        self._num_admitted = 0
        self._generations: dict[str, Generation] = {}
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._is_stopping = False
        self._has_ended = True
        self._thread: threading.Thread | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_running(self) -> bool:
        """The thread is alive and takes work."""
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    @property
    def is_idle(self) -> bool:
        """No call holds a seat."""
        return self._num_admitted == 0

    @property
    def num_waiting(self) -> int:
        """Sequences that were admitted and have no seat in a step: too many for the seats, or for the cache."""
        scheduler = self._engine.scheduler
        return max(self._num_admitted - scheduler.max_num_seqs, len(scheduler.waiting))

    def start(self) -> None:
        """Start the thread; outputs go to the event loop that is running now."""
        self._event_loop = asyncio.get_running_loop()
        self._is_stopping = self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="qerve-engine", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Take no more work and end every request that is left with an error; returns before that is done."""
        self.is_draining = True
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    async def stop(self) -> None:
        """``abandon``, and wait for the thread's end."""
        self.abandon()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def begin_drain(self) -> None:
        """Admit nothing more; what was admitted goes on."""
        self.is_draining = True

    def admit(self, num_sequences: int, *, keeps_seats: bool = False) -> Generation:
        """Seats for one call, taken at once.

        Args:
            num_sequences: how many of its requests the engine has at the same time.
            keeps_seats: the seats are for more requests than that, one after another, until the call is closed.

        Raises:
            DrainingError: the server is shutting down.
            QueueFullError: fewer than ``num_sequences`` seats are free.
        """
        if self.is_draining:
            raise DrainingError
        if self._num_admitted + num_sequences > self.capacity:
            raise QueueFullError
        self._num_admitted += num_sequences
        return Generation(self, num_sequences, keeps_seats)

    def add(self, generation: Generation, requests: Sequence[Request]) -> None:
        """Queue ``requests``; their outputs go to ``generation``."""
        self._generations.update((request.request_id, generation) for request in requests)
        if not self._post(lambda: self._add(requests)):
            self._deliver([_failed(request, "the server is shutting down") for request in requests])

    def abort(self, request_ids: set[str]) -> None:
        """Drop requests and free what they hold; nothing more is delivered for them."""
        for request_id in request_ids:
            self._generations.pop(request_id, None)
        if request_ids:
            self._post(lambda: self._engine.abort(request_ids))

    def release(self, num_seats: int) -> None:
        """Give admission seats back."""
        self._num_admitted -= num_seats

    def _post(self, command: Callable[[], None]) -> bool:
        """Give the thread a command; False when it has ended."""
        with self._wake:
            if self._has_ended:
                return False
            self._inbox.append(command)
            self._wake.notify()
        return True

    def _run(self) -> None:
        while not self._is_stopping:
            with self._wake:
                self._wake.wait_for(self._has_work)
                inbox, self._inbox = self._inbox, []
            try:
                for command in inbox:
                    command()
                self._publish(self._engine.step())
            except Exception:
                logger.exception("the engine loop failed outside a step")
                self._publish(self._engine.fail_all("the engine failed"))
        self._end_all()

    def _end_all(self) -> None:
        """Give everything that is left an end: the thread is about to be gone."""
        with self._wake:
            self._has_ended = True
            inbox, self._inbox = self._inbox, []
        for command in inbox:
            command()
        self._publish(self._engine.fail_all("the server is shutting down"))

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self._engine.add(request)
            except Exception:
                logger.exception("request %s cannot be queued", request.request_id)
                self._publish([_failed(request, "the engine cannot run this request")])

    def _has_work(self) -> bool:
        return bool(self._inbox or self._engine.has_work or self._is_stopping)

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        if outputs and self._event_loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._event_loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if output.finish_reason is not None:
                self._generations.pop(output.request_id, None)
            if generation is not None:
                generation.deliver(output)


def _failed(request: Request, message: str) -> RequestOutput:
    return RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=message)
