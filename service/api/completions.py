"""``POST /v1/completions``."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ..deps import Context, ContextDep, json_body
from ..errors import ApiError
from .admission import admit_prompts
from .envelope import answer_of, choice_event, usage_event
from .generation import Call, Choice, max_tokens_for, start, stream, tokenize, unless_disconnected
from .rank import check_rank, with_rank
from .sampling import sampling_of
from .schemas import CompletionBody
from .sse import DONE, encode_event
from .token_logprobs import completion_logprobs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
KIND = "text_completion"

router = APIRouter()


@router.post("/v1/completions", summary="Continue prompts")
async def completions(
    request: Request, context: ContextDep, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
) -> Response:
    """Continue each prompt, ``n`` times."""
    body.check()
    context.check_model(body.model)
    check_rank(context, body.rank)
    with ExitStack() as stack:
        generation = admit_prompts(request, context, body.prompt, body.n or 1)
        stack.callback(generation.close)
        is_marked = body.add_special_tokens is not False
        rows = await tokenize(context, body.prompt, "prompt", is_marked, body.truncate_prompt_tokens)
        limits = [max_tokens_for(context, len(row), body.max_tokens, DEFAULT_MAX_TOKENS) for row in rows]
        sampling = await sampling_of(context, body)
        context.metrics.request_accepted(body.n or 1)
        call = Call(f"cmpl-{uuid.uuid4().hex}", int(time.time()), sum(map(len, rows)), generation)
        start(context, call, body, sampling, rows=rows, max_tokens=limits, echoes=_echoes(context, body, rows))
        if body.stream:
            return with_rank(stream(context, _events(context, body, call), stack.pop_all().close), call.rank)
        choices = await unless_disconnected(request, context, call.finish())
        texts = [_choice(context, body, choice, choice.echo + choice.text, choice.token_ids) for choice in choices]
        if body.return_token_ids:
            for text in texts:
                text["prompt_token_ids"] = rows[text["index"] // (body.n or 1)]
        return with_rank(JSONResponse({**answer_of(context, call, KIND, texts), "usage": call.usage}), call.rank)


def _echoes(context: Context, body: CompletionBody, rows: list[list[int]]) -> list[str | None]:
    """The prompts as they are shown before their outputs: as they came, if they are whole and text."""
    if not body.echo:
        return [None] * len(rows)
    is_cut = body.truncate_prompt_tokens is not None
    decode = context.loaded.tokenizer.decode
    return [
        prompt if isinstance(prompt, str) and not is_cut else decode(row, skip_special_tokens=False)
        for prompt, row in zip(body.prompt, rows, strict=True)
    ]


async def _events(context: Context, body: CompletionBody, call: Call) -> AsyncIterator[bytes]:
    try:
        async for choice, output in call.outputs():
            if not (output.token_ids or output.finish_reason):
                continue  # a part of the prompt was scored: it is shown with the first token
            text, choice.echo = choice.echo + output.text, ""
            if text or output.finish_reason or choice.tokens.has_new or body.return_token_ids:
                yield choice_event(context, body, call, KIND, _choice(context, body, choice, text, output.token_ids))
        if body.include_usage:
            yield usage_event(context, call, KIND)
    except ApiError as error:
        yield encode_event(error.body())
    yield DONE


def _choice(
    context: Context, body: CompletionBody, choice: Choice, text: str, token_ids: Sequence[int]
) -> dict[str, Any]:
    logprobs = None
    if body.num_logprobs is not None:
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = completion_logprobs(context.speller, choice.tokens.take(), as_ids)
    values = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
    return {**values, "token_ids": list(token_ids)} if body.return_token_ids else values
