"""One call's share of the engine: its reservation, its deadline, and the outputs of its requests as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from .admission import Reservation
from .engine import RequestOutput
from .request import Request, SamplingParams


class DeadlineExceededError(Exception):
    """The call took longer than it may; what was left of it is aborted."""


class GaveWayError(Exception):
    """The call was one that nobody waits for, and another one came; what was left of it is aborted."""


class GenerationEngine(Protocol):
    """What a call needs of the engine."""

    def clock(self) -> float:
        """Seconds on the engine's clock."""
        ...

    def add(self, generation: "Generation", requests: Sequence[Request]) -> None:
        """Queue ``requests``; their outputs go to ``generation``."""
        ...

    def abort(self, request_ids: set[str]) -> None:
        """Drop requests and free what they hold."""
        ...


class Generation:
    """One call in the engine. Whoever gets one from ``AsyncEngine.admit`` closes it; closing aborts what is unfinished.

    keeps_seats:          a request's end does not free its seat: the next one of the same call takes it
    first_output_seconds: when its first output came, on the engine's clock; ``last_output_seconds`` likewise
    sampling:             how its tokens are chosen, with the largest ``max_tokens``; None: it wants none
    finish_reasons:       of its requests that have ended, in that order
    cache_salt:           keeps what it leaves in the prefix cache apart from what others do
    is_expired:           its deadline passed before it was closed
    """

    def __init__(self, engine: GenerationEngine, reservation: Reservation, keeps_seats: bool = False) -> None:
        self.arrival_seconds = engine.clock()
        self.first_output_seconds: float | None = None
        self.last_output_seconds = 0.0
        self.sampling: SamplingParams | None = None
        self.finish_reasons: list[str] = []
        self.num_prompt_tokens = 0
        self.is_expired = False
        self.cache_salt = ""
        self._engine = engine
        self._reservation = reservation
        self._keeps_seats = keeps_seats
        self._outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._unfinished: set[str] = set()
        self._is_started = False
        self._queued_tokens: dict[str, int] = {}
        self._num_output_tokens: dict[str, int] = {}
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_finished(self) -> bool:
        """Every request that was started has its last output."""
        return not self._unfinished

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, of all requests together."""
        return sum(self._num_output_tokens.values())

    @property
    def longest_output(self) -> int:
        """Tokens of the request that has got the most."""
        return max(self._num_output_tokens.values(), default=0)

    def expire_after(self, seconds: float) -> None:
        """End this call with ``DeadlineExceededError`` in ``seconds``."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire)

    def start(self, requests: Sequence[Request]) -> None:
        """Hand ``requests`` to the engine, at most one per seat that is free.

        Raises:
            QueueFullError: their prompts hold more tokens than were reserved, and too many for the queue.
        """
        self._is_started = True
        if not self._keeps_seats:
            self._queued_tokens = {request.request_id: request.num_prompt_tokens for request in requests}
            self._reservation.resize(sum(self._queued_tokens.values()))
        # The choices of one prompt share its list of tokens: it counts once.
        prompts = {id(request.prompt_token_ids): request.num_prompt_tokens for request in requests}
        self.num_prompt_tokens += sum(prompts.values())
        for request in requests:
            request.cache_salt = self.cache_salt
        self._unfinished |= {request.request_id for request in requests}
        self._engine.add(self, requests)

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Outputs of all requests, in the order the engine made them, until the last one of each.

        Raises:
            DeadlineExceededError: time is up.
            GaveWayError: another call came, and nobody waits for this one.
        """
        while not (self.is_finished and self._outputs.empty()):
            output = await self._outputs.get()
            if isinstance(output, Exception):
                raise output
            yield output

    def deliver(self, output: RequestOutput) -> None:
        """Take an output from the engine; a request's last one frees its seat even if nobody reads it."""
        self._outputs.put_nowait(output)
        if output.num_output_tokens:
            self.last_output_seconds = self._engine.clock()
            if self.first_output_seconds is None:
                self.first_output_seconds = self.last_output_seconds
        self._num_output_tokens[output.request_id] = output.num_output_tokens
        is_last = output.finish_reason is not None
        if output.finish_reason is not None:
            self.finish_reasons.append(output.finish_reason.value)
            self._unfinished.discard(output.request_id)
        if not self._keeps_seats and (is_last or output.num_output_tokens):  # its prompt waits no longer
            self._reservation.release(int(is_last), self._queued_tokens.pop(output.request_id, 0))

    def close(self) -> None:
        """Abort what is unfinished and give the reservation back; once is enough, twice does no harm."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._engine.abort(self._unfinished)
        self._unfinished = set()
        self._reservation.close()

    def give_way(self) -> None:
        """End this call with ``GaveWayError``."""
        self._engine.abort(self._unfinished)
        self._outputs.put_nowait(GaveWayError())

    def _expire(self) -> None:
        # Only its reader is late; but a call that keeps its seats may be about to start its next request.
        if self._is_started and self.is_finished and not self._keeps_seats:
            return
        self.is_expired = True
        self._engine.abort(self._unfinished)
        self._outputs.put_nowait(DeadlineExceededError())
