"""The engine's thread, and the asyncio side that talks to it.

One thread owns the engine: requests and aborts reach it through an inbox, outputs go back to the event loop in one hop
per step.
Steps that fail several times in a row, a step that does not end, or a loop that ends by itself are the engine's end: it
takes nothing more, everything it holds ends with an error, and ``failure`` says why. Nobody waits for a thread that is
gone.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence

from .admission import Admission, DrainingError
from .engine import Engine, RequestOutput
from .generation import Generation
from .request import FinishReason, Request
from .throughput import Throughput

logger = logging.getLogger("qerve.engine")


class AsyncEngine:
    """An ``Engine`` in its own thread.

    capacity:          sequences admitted at the same time, running and waiting together
    max_queued_tokens: prompt tokens that may wait; None: any number
    max_failed_steps:  failed steps in a row after which the engine ends
    step_timeout_seconds: after which a step counts as one that will not end
    """

    def __init__(
        self,
        engine: Engine,
        capacity: int,
        max_queued_tokens: int | None = None,
        max_failed_steps: int = 3,
        step_timeout_seconds: float = math.inf,
    ) -> None:
        self.admission = Admission(capacity, max_queued_tokens, engine.throughput)
        self.clock = engine.clock
        self.is_draining = False
        self._engine = engine
        self._max_failed_steps = max_failed_steps
        self._step_timeout_seconds = step_timeout_seconds
        self._step_started: float | None = None
        self._generations: dict[str, Generation] = {}
        self._background: Generation | None = None
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
    def is_ready(self) -> bool:
        """Requests may be sent here."""
        return self.is_running and not self.is_draining and self.failure is None and self._engine.health.is_sound

    @property
    def is_idle(self) -> bool:
        """No call holds a seat."""
        return self.admission.num_sequences == 0

    @property
    def failure(self) -> str | None:
        """Why the engine has ended by itself; None: it has not."""
        if self._engine.health.num_failed_steps >= self._max_failed_steps:
            return f"{self._engine.health.num_failed_steps} steps of the engine failed in a row"
        if self._has_ended and self._thread is not None and not self._is_stopping:
            return "the engine's thread has ended"
        if self._is_stuck:
            return f"a step of the engine does not end after {self._step_timeout_seconds:g} seconds"
        return None

    @property
    def _is_stuck(self) -> bool:
        started = self._step_started
        return started is not None and self.clock() - started > self._step_timeout_seconds

    @property
    def num_waiting(self) -> int:
        """Sequences that were admitted and have no seat in a step: too many for the seats, or for the cache."""
        scheduler = self._engine.scheduler
        return max(self.admission.num_sequences - scheduler.max_num_seqs, len(scheduler.waiting))

    @property
    def num_running(self) -> int:
        """Sequences that are computed in every step, but for those that nobody waits for."""
        return sum(not request.is_background for request in list(self._engine.scheduler.running))

    @property
    def num_deferred(self) -> int:
        """Sequences that were admitted and are not in the engine yet: being tokenized, or their grammar compiled."""
        return max(0, self.admission.num_sequences - self.num_running - len(self._engine.scheduler.waiting))

    @property
    def throughput(self) -> Throughput:
        """How fast the engine has been lately."""
        return self._engine.throughput

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

    def end_calls(self, message: str) -> None:
        """End everything with an error, from the event loop: for a thread that cannot do it any more."""
        self._deliver([_failure(request_id, message) for request_id in self._generations])

    async def stop(self, patience_seconds: float = 60.0) -> None:
        """``abandon``, and wait for the thread's end, which a step that hangs does not come to."""
        self.abandon()
        if self._thread is not None and not self._is_stuck:
            await asyncio.to_thread(self._thread.join, patience_seconds)

    def begin_drain(self) -> None:
        """Admit nothing more; what was admitted goes on."""
        self.is_draining = True

    def admit(self, num_sequences: int, num_tokens: int = 0, *, keeps_seats: bool = False) -> Generation:
        """Room for one call, taken at once.

        Args:
            num_sequences: how many of its requests the engine has at the same time.
            num_tokens: about how many tokens their prompts hold together.
            keeps_seats: the room is for more requests than that, one after another, until the call is closed.

        Raises:
            DrainingError: the server is shutting down.
            QueueFullError: there is too little room.
        """
        if self.is_draining or self.failure is not None:
            raise DrainingError
        reservation = self.admission.reserve(num_sequences, num_tokens)
        if self._background is not None:
            self._background.give_way()
        return Generation(self, reservation, keeps_seats)

    @contextlib.contextmanager
    def background(self) -> Iterator[Generation | None]:
        """A call without a seat for what nobody waits for, closed with the context; None: the engine has better to do.

        It ends with ``GaveWayError`` as soon as another call is admitted.
        """
        if not (self.is_idle and self.is_running) or self.is_draining or self._background is not None:
            yield None
            return
        no_seats = Admission(1, None, self._engine.throughput)
        self._background = Generation(self, no_seats.reserve(1, 0))
        try:
            yield self._background
        finally:
            self._background.close()
            self._background = None

    def add(self, generation: Generation, requests: Sequence[Request]) -> None:
        """Queue ``requests``; their outputs go to ``generation``."""
        self._generations.update((request.request_id, generation) for request in requests)
        if not self._post(lambda: self._add(requests)):
            self._deliver([_failure(request.request_id, "the server is shutting down") for request in requests])

    def abort(self, request_ids: set[str]) -> None:
        """Drop requests and free what they hold; nothing more is delivered for them."""
        for request_id in request_ids:
            self._generations.pop(request_id, None)
        if request_ids:
            self._post(lambda: self._engine.abort(request_ids))

    def _post(self, command: Callable[[], None]) -> bool:
        """Give the thread a command; False when it has ended."""
        with self._wake:
            if self._has_ended:
                return False
            self._inbox.append(command)
            self._wake.notify()
        return True

    def _run(self) -> None:
        try:
            while not self._is_stopping and self.failure is None:
                self._run_once()
        except BaseException:
            logger.critical("the engine's thread ends", exc_info=True)
        finally:
            self._end_all("the server is shutting down" if self._is_stopping else "the engine failed")

    def _run_once(self) -> None:
        """What has arrived, then one step."""
        with self._wake:
            self._wake.wait_for(self._has_work)
            inbox, self._inbox = self._inbox, []
        self._step_started = self.clock()
        try:
            for command in inbox:
                command()
            self._publish(self._engine.step())
        except Exception:
            logger.exception("the engine loop failed outside a step")
            self._engine.health.step_failed()
            self._publish(self._engine.fail_all("the engine failed"))
        finally:
            self._step_started = None

    def _end_all(self, message: str) -> None:
        """Give everything that is left an end: the thread is about to be gone."""
        with self._wake:
            self._has_ended = True
            inbox, self._inbox = self._inbox, []
        for command in inbox:
            command()
        self._publish(self._engine.fail_all(message))

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self._engine.add(request)
            except Exception:
                logger.exception("request %s cannot be queued", request.request_id)
                self._publish([_failure(request.request_id, "the engine cannot run this request")])

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


def _failure(request_id: str, message: str) -> RequestOutput:
    return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=message)
