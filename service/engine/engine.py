"""The engine's step: schedule, run, sample, collect. Synchronous, single-threaded, knows nothing of HTTP."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from .detokenizer import Decoder, Detokenizer, StopMatcher, TextStream, TokenTexts
from .health import EngineHealth
from .logits import LogitsProcessor
from .logprobs import TokenLogprobs
from .request import FinishReason, Request
from .runner import Runner
from .sampler import Sampled, sample_with_logprobs
from .scheduler import ScheduledRequest, Scheduler
from .speculation import sample_drafts
from .throughput import Throughput

logger = logging.getLogger("qerve.engine")


class EngineTokenizer(Decoder, Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...


class EngineObserver:
    """Is told what the engine does, in the engine's thread; this one does nothing with it."""

    def request_started(self, request: Request) -> None:
        """``request`` is in its first step; ``num_cached_tokens`` of its prompt were found in the cache."""

    def request_preempted(self, request: Request) -> None:
        """``request`` gave its cache blocks to earlier ones and waits to be computed again."""

    def step_ran(self, num_tokens: int) -> None:
        """A forward pass over ``num_tokens`` tokens is done."""

    def step_failed(self) -> None:
        """A step raised an exception."""

    def token_generated(self, request: Request, previous_seconds: float | None) -> None:
        """``request`` got a token; the one before it came at ``previous_seconds`` (None: this is the first)."""

    def request_finished(self, request: Request) -> None:
        """``request`` has its ``finish_reason``."""

    def draft_checked(self, num_tokens: int, num_accepted: int) -> None:
        """A draft of ``num_tokens`` was computed; the first ``num_accepted`` of them are what the request got."""

    def logits_not_finite(self) -> None:
        """A row of logits held NaN or infinity."""


_NOBODY = EngineObserver()


class RequestOutput(NamedTuple):
    """What one step gave one request: ``text`` to append; with ``finish_reason`` it is the last one.

    error:           what went wrong, where that is the reason
    is_refused:      what went wrong is that the request asks for what cannot be
    prompt_logprobs: of the next scored prompt tokens, in their order
    num_cached_tokens: prompt tokens that were taken from the prefix cache
    token_ids:       what was generated
    logprobs:        of those tokens, where they are wanted
    """

    request_id: str
    text: str = ""
    num_output_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_refused: bool = False
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    num_cached_tokens: int = 0
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()


class Engine:
    """Generates for all its requests at once, one token each per step."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: EngineTokenizer,
        observer: EngineObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self.health = EngineHealth()
        self.throughput = Throughput()
        self._runner = runner
        self._decoder = TokenTexts(tokenizer)
        self._eos_token_ids = tokenizer.eos_token_ids
        self._observer = observer
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, TextStream] = {}

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue ``request``."""
        params = request.params
        request.ending_token_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else self._eos_token_ids)
        if params.changes_logits:
            request.logits_processor = LogitsProcessor(params, request.prompt_token_ids, request.ending_token_ids)
        detokenizer = Detokenizer(self._decoder, request.prompt_token_ids, params.skips_special_tokens)
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        self._texts[request.request_id] = TextStream(detokenizer, StopMatcher(params.stop, params.includes_stop))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests and free what they hold; those that have finished already are left alone."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, FinishReason.ABORT)

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request with an error that says ``message``."""
        return [self._fail(request, message) for request in list(self._requests.values())]

    def step(self) -> list[RequestOutput]:
        """The next token of every request whose known tokens this step completes: all but those inside their prompt.

        Where the tokens of a request's draft turn out to be right, it gets an output for each of them as well.

        Requests that are scored get log-probabilities of their prompts' tokens besides, as they are computed.

        An exception fails the requests of this step and nothing else.
        """
        scheduled = self.scheduler.schedule()
        for request in self.scheduler.preempted:
            self._observer.request_preempted(request)
        if not scheduled:
            return []
        try:
            tokens, scores = self._run(scheduled)
        except Exception:
            logger.exception("a step of %d requests failed", len(scheduled))
            self.health.step_failed()
            self._observer.step_failed()
            return [self._fail(item.request, "the model failed on this request") for item in scheduled]
        outputs = [self._collect_scores(item.request, scores.get(item.request, [])) for item in scheduled]
        # Of a request that failed by its scores, the token is of no use.
        outputs += [self._collect(request, sampled) for request, sampled in tokens if not request.is_finished]
        return [output for output in outputs if output is not None]

    def _run(
        self, scheduled: Sequence[ScheduledRequest]
    ) -> tuple[list[tuple[Request, Sampled]], dict[Request, list[TokenLogprobs]]]:
        """The next token of every request that gets one; scores of prompts."""
        started = self.clock()
        logits, scores = self._runner.run(scheduled)
        tokens: list[tuple[Request, Sampled]] = []
        if logits is not None:
            tokens = sample_drafts(logits, scheduled, sample_with_logprobs, lambda sampled: sampled.token_id)
        for request, num_new, _, draft in scheduled:
            self.scheduler.advance(request, num_new - len(draft))
            if request.scheduled_seconds is None:
                request.scheduled_seconds = started
                self._observer_of(request).request_started(request)
        num_tokens = sum(item.num_tokens for item in scheduled)
        if not scheduled[0].request.is_background:  # which only runs alone
            self._observer.step_ran(num_tokens)
            self.throughput.step_ran(num_tokens, self.clock() - started)
        self.health.step_succeeded()
        self._count_drafts(scheduled, tokens)
        return tokens, scores

    def _count_drafts(self, scheduled: Sequence[ScheduledRequest], tokens: Sequence[tuple[Request, object]]) -> None:
        num_tokens = Counter(request for request, _ in tokens)
        for item in scheduled:
            if item.draft:
                self._observer.draft_checked(len(item.draft), num_tokens[item.request] - 1)

    def _collect_scores(self, request: Request, scores: Sequence[TokenLogprobs]) -> RequestOutput | None:
        """What a step says of a request's prompt; its end, if nothing is to be generated; None: nothing to say."""
        if not all(math.isfinite(score.logprob) for score in scores):
            return self._fail_not_finite(request)
        request.score_from += len(scores)
        is_done = not request.wants_tokens and request.is_prompt_computed
        if is_done:
            self._finish(request, FinishReason.LENGTH)
        elif not scores:
            return None
        self.health.request_advanced()
        return RequestOutput(request.request_id, finish_reason=request.finish_reason, prompt_logprobs=scores)

    def _collect(self, request: Request, sampled: Sampled) -> RequestOutput:
        if sampled.token_id is None:
            processor = request.logits_processor
            if processor is not None and processor.problem is not None:
                return self._fail(request, processor.problem)._replace(is_refused=True)
            return self._fail_not_finite(request)
        # The token before this one was a draft's, and this step has computed it.
        self.scheduler.advance(request, request.num_uncomputed_tokens)
        try:
            return self._append(request, sampled.token_id, sampled.logprobs)
        except Exception:
            logger.exception("token %d of request %s cannot be turned into text", sampled.token_id, request.request_id)
            return self._fail(request, "the model's output cannot be turned into text")

    def _append(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Add ``token`` to the request and decide whether it was its last."""
        request.output_token_ids.append(token)
        previous, request.last_token_seconds = request.last_token_seconds, self.clock()
        if previous is None:
            request.first_token_seconds = request.last_token_seconds
        self._observer.token_generated(request, previous)
        self.health.request_advanced()
        stream = self._texts[request.request_id]
        text = "" if request.is_hidden(token) else stream.push(token)
        reason = self._finish_reason(request, stream.is_stopped)
        if reason is not None:
            text += stream.flush()
            # The text that was still held may have completed a stop string.
            reason = FinishReason.STOP if stream.is_stopped else reason
            self._finish(request, reason)
        return RequestOutput(
            request.request_id,
            text,
            request.num_output_tokens,
            reason,
            num_cached_tokens=request.num_cached_tokens,
            token_ids=(token,),
            logprobs=() if logprobs is None else (logprobs,),
        )

    def _finish_reason(self, request: Request, is_stopped: bool) -> FinishReason | None:
        """Whether the newest token is the last one, and why."""
        processor, output = request.logits_processor, request.output_token_ids
        if is_stopped or output[-1] in request.ending_token_ids:
            return FinishReason.STOP
        if processor is not None and processor.is_complete(output):
            return FinishReason.STOP
        return FinishReason.LENGTH if request.num_output_tokens >= request.params.max_tokens else None

    def _fail_not_finite(self, request: Request) -> RequestOutput:
        self._observer.logits_not_finite()
        self.health.request_broke()
        return self._fail(request, "the model produced values that are not finite")

    def _fail(self, request: Request, message: str) -> RequestOutput:
        self._finish(request, FinishReason.ERROR)
        return RequestOutput(request.request_id, "", request.num_output_tokens, FinishReason.ERROR, message)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        request.finished_seconds = self.clock()
        if request.params.max_tokens:
            self.throughput.request_finished(request.num_output_tokens)
        del self._requests[request.request_id]
        del self._texts[request.request_id]
        self._observer_of(request).request_finished(request)

    def _observer_of(self, request: Request) -> EngineObserver:
        """Who is told of ``request``: what nobody waits for is not counted with what somebody does."""
        return _NOBODY if request.is_background else self._observer
