"""What completions and chat completions share: from a checked body to running requests, and their outputs collected."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from ..deps import Context
from ..engine.engine import RequestOutput
from ..engine.generation import DeadlineExceededError, Generation
from ..engine.request import FinishReason, Request, SamplingParams
from ..errors import ApiError, bad_request, deadline_exceeded, internal_error
from .rank import rank_in_engine, rank_of
from .schemas import GenerationBody, Prompt
from .sse import EventStream, StreamEnd
from .token_logprobs import ChoiceTokens

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """One output of a call: ``index`` among its choices, and what has come so far.

    is_first:          of the choices of its prompt
    echo:              text before the output
    tokens:            log-probabilities, where they are wanted
    num_cached_tokens: tokens of the prompt that the cache had already when this choice started
    """

    index: int
    tokens: ChoiceTokens
    is_first: bool = True
    echo: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Call:
    """One generation call in progress.

    rank:    of the corrections, for all of its sequences
    choices: by the engine's request id
    """

    call_id: str
    created: int
    num_prompt_tokens: int
    generation: Generation
    rank: int = 0
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many choices it has, and as its first one found it."""
        num_generated = sum(len(choice.token_ids) for choice in self.choices.values())
        num_cached = sum(choice.num_cached_tokens for choice in self.choices.values() if choice.is_first)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self.num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    async def outputs(self) -> AsyncIterator[tuple[Choice, RequestOutput]]:
        """Each output with the choice it was added to.

        Raises:
            ApiError: 500, the engine failed on a request of this call; 400, the request cannot be carried out; 408,
                time is up.
        """
        try:
            async for output in self.generation.outputs():
                yield self._add(output), output
        except DeadlineExceededError:
            raise deadline_exceeded() from None

    def _add(self, output: RequestOutput) -> Choice:
        if output.finish_reason is FinishReason.ERROR:
            raise _failure(output)
        choice = self.choices[output.request_id]
        choice.text += output.text
        choice.token_ids += output.token_ids
        choice.tokens.add(output)
        choice.num_cached_tokens = output.num_cached_tokens
        choice.finish_reason = output.finish_reason
        return choice

    async def finish(self) -> list[Choice]:
        """Wait for the end of every choice."""
        async for _ in self.outputs():
            pass
        return sorted(self.choices.values(), key=lambda choice: choice.index)


async def tokenize(
    context: Context,
    prompts: Sequence[Prompt],
    param: str,
    add_special_tokens: bool = True,
    num_kept: int | None = None,
) -> list[list[int]]:
    """Token ids of every prompt, in a worker thread; each is shorter than the context.

    num_kept: no more than so many of its last tokens are kept of each

    Raises:
        ApiError: 400, a prompt that is empty or too long, or an id outside the vocabulary.
    """
    tokenizer, context_len = context.loaded.tokenizer, context.info.max_model_len
    rows: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            # Cut, it still holds more tokens than any number that can be kept.
            text = prompt if num_kept is None else prompt[-context.max_prompt_chars :]
            if len(text) > context.max_prompt_chars:  # cannot fit, whatever its tokens are: not worth tokenizing
                raise _too_long(context, f"of {len(text)} characters", param)
            rows.append(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens))
        else:
            rows.append(prompt)
    if num_kept is not None:
        rows = [row[-num_kept:] for row in rows]
    for row in rows:
        check_token_ids(context, row, param)
        if len(row) >= context_len:
            raise _too_long(context, f"of {len(row)} tokens", param, len(row))
    return rows


def check_token_ids(context: Context, token_ids: Sequence[int], param: str) -> None:
    """Raise 400 for no tokens at all, or an id that the model has no embedding for."""
    if not token_ids:
        raise bad_request(f"{param}: there are no tokens in it.", param)
    check_vocabulary(context, [max(token_ids)], param)


def check_vocabulary(context: Context, token_ids: Iterable[int], param: str) -> None:
    """Raise 400 for the first id that the model has no embedding for."""
    vocab_size = context.loaded.model.config.vocab_size
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise bad_request(f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}.", param)


def max_tokens_for(context: Context, num_prompt_tokens: int, requested: int | None, default: int | None) -> int:
    """Output tokens that a prompt may get: what is asked for, else ``default`` or all that the context has left.

    Raises:
        ApiError: 400, they do not fit the context together with the prompt.
    """
    room = context.info.max_model_len - num_prompt_tokens
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        context.metrics.rejected("too_long")
        message = (
            f"This model's maximum context length is {context.info.max_model_len} tokens, but {num_prompt_tokens} in "
            f"the prompt and {requested} of output make {num_prompt_tokens + requested}: shorten the prompt or lower "
            "max_tokens."
        )
        raise bad_request(message, "max_tokens", n_prompt_tokens=num_prompt_tokens, n_ctx=context.info.max_model_len)
    return requested


def start(
    context: Context,
    call: Call,
    body: GenerationBody,
    sampling: SamplingParams,
    *,
    rows: Sequence[list[int]],
    max_tokens: Sequence[int],
    echoes: Sequence[str | None] = (),
) -> None:
    """Queue every choice of every prompt, numbered as OpenAI numbers them: prompt by prompt.

    sampling: of all of them; with a seed, every choice of a prompt gets a seed of its own
    echoes:   text to show before the output of each prompt, if any
    """
    call.rank = rank_of(
        context, body.rank, len(rows) * (body.n or 1), is_scored=sampling.num_prompt_logprobs is not None
    )
    requests, rank = [], rank_in_engine(context, call.rank)
    for row, limit, echo in zip(rows, max_tokens, echoes or [None] * len(rows), strict=True):
        for choice in range(body.n or 1):
            request_id = uuid.uuid4().hex
            seed = None if sampling.seed is None else sampling.seed + choice
            params = replace(sampling, max_tokens=limit, seed=seed)
            request = Request(request_id, row, params, call.generation.arrival_seconds, rank=rank)
            tokens = ChoiceTokens(context.speller, request, echo is not None)
            call.choices[request_id] = Choice(len(call.choices), tokens, choice == 0, echo or "")
            requests.append(request)
    call.generation.sampling = replace(sampling, max_tokens=max(max_tokens))
    call.generation.start(requests)


async def unless_disconnected(request: HttpRequest, context: Context, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ApiError: 499, the client left; nobody reads it, but the metrics count it.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            context.metrics.client_disconnected()
            raise ApiError(499, "The client left.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def stream(context: Context, events: AsyncIterator[bytes], close: Callable[[], None]) -> EventStream:
    """A response of ``events`` that calls ``close`` at its end."""

    def finish(end: StreamEnd) -> None:
        if end is StreamEnd.STALLED:
            context.metrics.reader_stalled()
        elif end is StreamEnd.DISCONNECTED:
            context.metrics.client_disconnected()
        close()

    settings = context.settings
    return EventStream(events, finish, settings.sse_heartbeat_seconds, settings.sse_write_timeout_seconds)


def _failure(output: RequestOutput) -> ApiError:
    if output.is_refused:
        return bad_request(f"Generation ended: {output.error}.")
    return internal_error(f"Generation failed: {output.error}.")


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(context: Context, length: str, param: str, num_tokens: int | None = None) -> ApiError:
    context.metrics.rejected("too_long")
    details: dict[str, Any] = {"n_ctx": context.info.max_model_len}
    if num_tokens is not None:
        details["n_prompt_tokens"] = num_tokens
    message = (
        f"This model's maximum context length is {context.info.max_model_len} tokens, prompt and output together; a "
        f"prompt {length} leaves no room. Shorten it."
    )
    return bad_request(message, param, **details)
