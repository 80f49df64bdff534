"""Which requests run in the next step. Policy only: no tensors, no clocks.

Every running request decodes one token in every step, so nobody who started ever waits. Then, in order of arrival,
waiting requests join with their whole prompt while there is a seat, a cache reservation and room in the step's token
budget. A request's blocks are reserved to its last possible token before it starts, so none is ever preempted; nobody
overtakes the head of the queue, so none starves.
"""

from collections import deque
from dataclasses import dataclass

from .block_manager import BlockManager
from .request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """``num_tokens`` tokens of ``request``, from its first uncomputed one on, are computed in this step."""

    request: Request
    num_tokens: int


class Scheduler:
    """The waiting queue and the running set.

    max_num_seqs:           requests that run at the same time
    max_num_batched_tokens: tokens of one step; a longer prompt still runs, as the only prompt of its step
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue ``request``.

        Raises:
            ValueError: it could never run, because it needs more blocks than the whole cache has.
        """
        if self.blocks.num_blocks_for(request.num_reserved_tokens) > self.blocks.num_blocks:
            raise ValueError(
                f"request {request.request_id} reserves {request.num_reserved_tokens} tokens, "
                f"the cache holds {self.blocks.num_blocks * self.blocks.block_size}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The requests of the next step; those that join are moved to ``running`` with their blocks reserved."""
        step = [ScheduledRequest(request, request.num_uncomputed_tokens) for request in self.running]
        budget = self.max_num_batched_tokens - sum(item.num_tokens for item in step)
        is_first_prompt = True
        while self.waiting and self._can_start(self.waiting[0]):
            num_tokens = self.waiting[0].num_uncomputed_tokens
            if num_tokens > budget and not is_first_prompt:
                break
            request = self.waiting.popleft()
            request.block_table = self.blocks.allocate(request.num_reserved_tokens)
            self.running.append(request)
            step.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
            is_first_prompt = False
        return step

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take ``request`` out of the queue or the running set and free its blocks; a finished one stays as it is."""
        if request.is_finished:
            return
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.blocks.free(request.block_table)
        request.block_table = []

    def _can_start(self, request: Request) -> bool:
        has_seat = len(self.running) < self.max_num_seqs
        return has_seat and self.blocks.can_allocate(request.num_reserved_tokens)
