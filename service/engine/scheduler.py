"""Which requests run in the next step, and how many tokens of each. Policy only: no tensors, no clocks.

A step has a budget of tokens. Every running request whose prompt is computed decodes one token in every step, so a
decode never waits for a prompt. Prompts share what is left, in order of arrival: each gets as much as fits, cut at a
block boundary, and nobody overtakes a prompt that was cut, so prompts are completed in the order in which they came
and a long one delays the decodes by no more than one step's budget at a time.

A prompt starts when there are blocks for all of it and one more for everybody who runs; leading blocks that the cache
has already are shared, and a prompt whose next block is being computed in this very step waits for it. Decodes take
blocks as they need them. When there are none left, the request that came last is preempted: it gives its blocks back
and waits at the head of the queue to be computed again, prompt and output, from wherever the cache has forgotten it.
So the order of arrival holds throughout: who runs came before who waits, the first of all is never preempted, since
the whole cache is enough for any one request, and everybody ends.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from .block_keys import keys_of
from .block_manager import BlockManager
from .ngram import Drafter
from .request import FinishReason, Request

BACKGROUND_TOKENS = 64
"""Of one step of a request that nobody waits for: what the next one that somebody does wait for may have to sit out."""


class ScheduledRequest(NamedTuple):
    """``num_tokens`` tokens of ``request``, from its first uncomputed one on, are computed in this step.

    gets_token: they are all that is known of it, so that the step gives its next token, and it wants one
    draft:      tokens that may follow; they are among the ``num_tokens``, at their end
    """

    request: Request
    num_tokens: int
    gets_token: bool
    draft: Sequence[int] = ()


class Scheduler:
    """The waiting queue and the running set, both in order of arrival.

    max_num_seqs:           requests that run at the same time
    max_num_batched_tokens: tokens of one step; a block of a prompt fits beside the decodes if it is that much larger
                            than max_num_seqs, else prompts may have to wait for decodes to end
    drafter:                guesses at what decodes may get next, computed along with them; None: none are made
    preempted:              requests that the last ``schedule`` took out of the running set
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, drafter: Drafter | None = None
    ) -> None:
        if max_num_batched_tokens < blocks.block_size:
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is less than a block of {blocks.block_size} tokens"
            )
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.drafter = drafter
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preempted: list[Request] = []

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
                f"request {request.request_id} may take {request.num_reserved_tokens} tokens, "
                f"the cache holds {self.blocks.num_blocks * self.blocks.block_size}"
            )
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The next step: decodes, then prompts; those that join are moved to ``running`` with blocks for all of it."""
        self.preempted = []
        step = self._decodes()
        budget = self.max_num_batched_tokens - sum(item.num_tokens for item in step)
        being_computed: set[bytes] = set()
        for request in self._prompts():
            room = min(budget, BACKGROUND_TOKENS) if request.is_background else budget
            if not (request.block_table or self._has_started(request, room, being_computed)):
                break
            num_tokens = self._chunk(request.num_computed_tokens, request.num_tokens, room)
            if num_tokens == 0:
                break
            is_last_chunk = num_tokens == request.num_uncomputed_tokens
            step.append(ScheduledRequest(request, num_tokens, is_last_chunk and request.wants_tokens))
            if not is_last_chunk:
                break
            budget -= num_tokens
            being_computed.update(self._keys_of(request, request.num_tokens))
        return step

    def advance(self, request: Request, num_tokens: int) -> None:
        """``num_tokens`` more of ``request`` are computed: blocks that this completes can be found from now on."""
        size = self.blocks.block_size
        num_before = request.num_computed_tokens // size
        request.num_computed_tokens += num_tokens
        num_full = request.num_computed_tokens // size
        if num_full > num_before and self.blocks.has_prefix_cache and not request.is_background:
            keys, table = keys_of(request, num_full, size), request.block_table
            for index in range(num_before, num_full):
                table[index] = self.blocks.publish(table[index], keys[index])

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take ``request`` out of the queue or the running set and free its blocks; a finished one stays as it is.

        What a request that failed has computed is not found by others.
        """
        if request.is_finished:
            return
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if self.drafter is not None:
            self.drafter.forget(request)
        if reason is FinishReason.ERROR:
            self.blocks.forget(request.block_table)
        self._release(request)

    def _decodes(self) -> list[ScheduledRequest]:
        """The next token of each request that decodes, which has a block for it, and drafts of those after that."""
        decoding = [request for request in list(self.running) if request.is_decoding and self._has_room(request)]
        # Drafts leave room for a block of a prompt.
        room = self.max_num_batched_tokens - self.blocks.block_size - len(decoding)
        step = []
        for request in decoding:
            draft = self._draft(request, room)
            room -= len(draft)
            step.append(ScheduledRequest(request, 1 + len(draft), request.wants_tokens, draft))
        return step

    def _draft(self, request: Request, room: int) -> Sequence[int]:
        """Tokens that may follow, at most ``room`` and as many as there are blocks for without taking anybody's."""
        draft = () if self.drafter is None else self.drafter.draft(request, room)
        num_missing = self.blocks.num_blocks_for(request.num_tokens + len(draft)) - len(request.block_table)
        if num_missing > 0 and self.blocks.can_allocate(num_missing + len(self.running)):
            request.block_table += self.blocks.allocate(num_missing)
        return draft[: len(request.block_table) * self.blocks.block_size - request.num_tokens]

    def _has_room(self, request: Request) -> bool:
        """``request`` has a block for its newest token, if need be one of a later request's; False: it is preempted."""
        while len(request.block_table) * self.blocks.block_size < request.num_tokens:
            if not request.block_table:  # preempted for the sake of an earlier one in this step
                return False
            if self.blocks.num_free_blocks:
                request.block_table += self.blocks.allocate(1)
            else:
                self._preempt(self.running.pop())
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.preempted.append(request)

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        request.block_table = []

    def _prompts(self) -> list[Request]:
        """Requests whose prompt is not computed, oldest first: one that was cut, and those that there is a seat for."""
        started = [request for request in self.running[-1:] if not request.is_decoding]
        return started + list(islice(self.waiting, self.max_num_seqs - len(self.running)))

    def _chunk(self, start: int, end: int, budget: int) -> int:
        """How many of tokens ``start .. end`` run now: all if they fit, else up to a block boundary; 0: no block fits.

        Chunks that begin at a block boundary keep the attention over them in whole tiles.
        """
        if end - start <= budget:
            return end - start
        return max(0, (start + budget) // self.blocks.block_size * self.blocks.block_size - start)

    def _has_started(self, request: Request, budget: int, being_computed: set[bytes]) -> bool:
        """``request``, the head of the queue, runs from now on: False when it has to wait.

        It waits when not one block of it fits into ``budget``, when the cache has too few free blocks, and when the
        first block that it would compute is among those ``being_computed``.
        """
        keys = self._keys_of(request, request.num_cacheable_tokens)
        found = self.blocks.find(keys)
        is_being_computed = len(found) < len(keys) and keys[len(found)] in being_computed
        start = len(found) * self.blocks.block_size
        if is_being_computed or not self._chunk(start, request.num_tokens, budget):
            return False
        # One more for each that runs, so that starting it preempts nobody in the steps that follow.
        num_wanted = self.blocks.num_blocks_for(request.num_tokens) - len(found)
        if not self.blocks.can_allocate(num_wanted + len(self.running), found):
            return False
        self.blocks.hold(found)
        request.block_table = found + self.blocks.allocate(num_wanted)
        request.num_computed_tokens = start
        if request.scheduled_seconds is None:
            request.num_cached_tokens = start
        self.running.append(self.waiting.popleft())
        return True

    def _keys_of(self, request: Request, num_tokens: int) -> list[bytes]:
        """Keys of the full blocks of the first ``num_tokens`` tokens; none where blocks are not to be found."""
        if request.is_background or not self.blocks.has_prefix_cache:
            return []
        num_blocks = num_tokens // self.blocks.block_size
        return keys_of(request, num_blocks, self.blocks.block_size)[:num_blocks]
