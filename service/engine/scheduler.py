"""Which requests run in the next step, and how many tokens of each. Policy only: no tensors, no clocks.

A step has a budget of tokens. Every running request whose prompt is computed decodes one token in every step, so a
decode never waits for a prompt. Prompts share what is left, in order of arrival: each gets as much as fits, cut at a
block boundary, and nobody overtakes a prompt that was cut, so prompts are completed in the order in which they came
and a long one delays the decodes by no more than one step's budget at a time.
A request's blocks are reserved to its last possible token before it starts, so none is ever preempted; nobody
overtakes the head of the queue, so none starves.
"""

from collections import deque
from itertools import islice
from typing import NamedTuple

from .block_manager import BlockManager
from .request import FinishReason, Request


class ScheduledRequest(NamedTuple):
    """``num_tokens`` tokens of ``request``, from its first uncomputed one on, are computed in this step.

    gets_token: they are all that is known of it, so that the step gives its next token, and it wants one
    """

    request: Request
    num_tokens: int
    gets_token: bool


class Scheduler:
    """The waiting queue and the running set.

    max_num_seqs:           requests that run at the same time
    max_num_batched_tokens: tokens of one step; a block of a prompt fits beside the decodes if it is that much larger
                            than max_num_seqs, else prompts may have to wait for decodes to end
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_batched_tokens < blocks.block_size:
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is less than a block of {blocks.block_size} tokens"
            )
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
            ValueError: it could never run: it needs more blocks than the whole cache has, or has nothing to compute.
        """
        if not request.prompt_token_ids:
            raise ValueError(f"request {request.request_id} has no prompt")
        if self.blocks.num_blocks_for(request.num_reserved_tokens) > self.blocks.num_blocks:
            raise ValueError(
                f"request {request.request_id} reserves {request.num_reserved_tokens} tokens, "
                f"the cache holds {self.blocks.num_blocks * self.blocks.block_size}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The next step: decodes, then prompts; those that join are moved to ``running`` with their blocks reserved."""
        step = [ScheduledRequest(request, 1, True) for request in self.running if request.is_prompt_computed]
        budget = self.max_num_batched_tokens - len(step)
        for request in self._prompts():
            num_tokens = self._chunk_of(request, budget)
            if num_tokens == 0 or not self._has_started(request):
                break
            is_last_chunk = num_tokens == request.num_uncomputed_tokens
            step.append(ScheduledRequest(request, num_tokens, is_last_chunk and request.params.max_tokens > 0))
            if not is_last_chunk:
                break
            budget -= num_tokens
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

    def _prompts(self) -> list[Request]:
        """Requests whose prompt is not computed, oldest first: those that run, and those that there is a seat for."""
        started = [request for request in self.running if not request.is_prompt_computed]
        return started + list(islice(self.waiting, self.max_num_seqs - len(self.running)))

    def _chunk_of(self, request: Request, budget: int) -> int:
        """How much of the prompt runs now: the rest if it fits, else up to a block boundary; 0: not one block fits.

        Chunks that begin at a block boundary keep the attention over them in whole tiles.
        """
        if request.num_uncomputed_tokens <= budget:
            return request.num_uncomputed_tokens
        end = (request.num_computed_tokens + budget) // self.blocks.block_size * self.blocks.block_size
        return max(0, end - request.num_computed_tokens)

    def _has_started(self, request: Request) -> bool:
        """``request`` runs, if need be from now on: False when the head of the queue finds too few free blocks."""
        if request.block_table:
            return True
        if not self.blocks.can_allocate(request.num_reserved_tokens):
            return False
        request.block_table = self.blocks.allocate(request.num_reserved_tokens)
        self.running.append(self.waiting.popleft())
        return True
