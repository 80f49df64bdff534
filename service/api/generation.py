"""What completions and chat completions share: from a checked body to running requests, and their outputs collected."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from ..deps import Context
from ..engine.engine import RequestOutput
from ..engine.generation import DeadlineExceededError, Generation
from ..engine.request import FinishReason, Request, SamplingParams
from ..errors import ApiError, bad_request, deadline_exceeded, internal_error
from .schemas import GenerationBody, Prompt
from .sse import EventStream, StreamEnd

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """One output of a call: ``index`` among its choices, and what has come so far.

    is_first:          of the choices of its prompt
    num_cached_tokens: tokens of the prompt that the cache had already when this choice started
    """

    index: int
    is_first: bool = True
    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Call:
    """One generation call in progress.

    choices: by the engine's request id
    """

    call_id: str
    created: int
    num_prompt_tokens: int
    generation: Generation
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many choices it has, and as its first one found it."""
        num_generated = sum(choice.num_tokens for choice in self.choices.values())
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
            ApiError: 500, the engine failed on a request of this call; 408, time is up.
        """
        try:
            async for output in self.generation.outputs():
                yield self._add(output), output
        except DeadlineExceededError:
            raise deadline_exceeded() from None

    def _add(self, output: RequestOutput) -> Choice:
        if output.finish_reason is FinishReason.ERROR:
            raise internal_error(f"Generation failed: {output.error}.")
        choice = self.choices[output.request_id]
        choice.text += output.text
        choice.num_tokens = output.num_output_tokens
        choice.num_cached_tokens = output.num_cached_tokens
        choice.finish_reason = output.finish_reason
        return choice

    async def finish(self) -> list[Choice]:
        """Wait for the end of every choice."""
        async for _ in self.outputs():
            pass
        return sorted(self.choices.values(), key=lambda choice: choice.index)


async def tokenize(
    context: Context, prompts: Sequence[Prompt], param: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of every prompt, in a worker thread; each is shorter than the context.

    Raises:
        ApiError: 400, a prompt that is empty or too long, or an id outside the vocabulary.
    """
    tokenizer, context_len = context.loaded.tokenizer, context.info.max_model_len
    rows: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if len(prompt) > context.max_prompt_chars:  # cannot fit, whatever its tokens are: not worth tokenizing
                raise _too_long(context, f"of {len(prompt)} characters", param)
            rows.append(await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens))
        else:
            rows.append(prompt)
    for row in rows:
        check_token_ids(context, row, param)
        if len(row) >= context_len:
            raise _too_long(context, f"of {len(row)} tokens", param, len(row))
    return rows


def check_token_ids(context: Context, token_ids: Sequence[int], param: str) -> None:
    """Raise 400 for no tokens at all, or an id that the model has no embedding for."""
    vocab_size = context.loaded.model.config.vocab_size
    if not token_ids:
        raise bad_request(f"{param}: there are no tokens in it.", param)
    if max(token_ids) >= vocab_size:
        raise bad_request(f"{param}: token id {max(token_ids)} is outside the vocabulary of {vocab_size}.", param)


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


def sampling_params(body: GenerationBody, max_tokens: int, choice: int) -> SamplingParams:
    """How to sample the ``choice``-th output of a prompt; with a seed, every choice gets a seed of its own."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=None if body.seed is None else body.seed + choice,
        stop=body.stop,
        ignore_eos=bool(body.ignore_eos),
    )


def start(call: Call, body: GenerationBody, rows: Sequence[list[int]], max_tokens: Sequence[int]) -> None:
    """Queue every choice of every prompt, numbered as OpenAI numbers them: prompt by prompt."""
    requests = []
    num_choices = body.n or 1
    for row, limit in zip(rows, max_tokens, strict=True):
        for choice in range(num_choices):
            request_id = uuid.uuid4().hex
            call.choices[request_id] = Choice(len(call.choices), is_first=choice == 0)
            params = sampling_params(body, limit, choice)
            requests.append(Request(request_id, row, params, call.generation.arrival_seconds))
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


def stream(context: Context, events: AsyncIterator[str], close: Callable[[], None]) -> EventStream:
    """A response of ``events`` that calls ``close`` at its end."""

    def finish(end: StreamEnd) -> None:
        if end is StreamEnd.STALLED:
            context.metrics.reader_stalled()
        elif end is StreamEnd.DISCONNECTED:
            context.metrics.client_disconnected()
        close()

    settings = context.settings
    return EventStream(events, finish, settings.sse_heartbeat_seconds, settings.sse_write_timeout_seconds)


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
