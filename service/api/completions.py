"""``POST /v1/completions``."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ..deps import Context, ContextDep, json_body
from ..errors import ApiError
from .admission import admit_prompts
from .generation import Call, Choice, max_tokens_for, start, stream, tokenize, unless_disconnected
from .schemas import CompletionBody
from .sse import DONE, encode_event

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

router = APIRouter()


@router.post("/v1/completions", summary="Continue prompts")
async def completions(
    request: Request, context: ContextDep, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
) -> Response:
    """Continue each prompt, ``n`` times."""
    body.check()
    context.check_model(body.model)
    with ExitStack() as stack:
        generation = admit_prompts(request, context, body.prompt, body.n or 1)
        stack.callback(generation.close)
        rows = await tokenize(context, body.prompt, "prompt")
        limits = [max_tokens_for(context, len(row), body.max_tokens, DEFAULT_MAX_TOKENS) for row in rows]
        context.metrics.request_accepted(body.n or 1)
        call = Call(f"cmpl-{uuid.uuid4().hex}", int(time.time()), sum(map(len, rows)), generation)
        start(call, body, rows, limits)
        if body.stream:
            return stream(context, _events(context, body, call), stack.pop_all().close)
        choices = await unless_disconnected(request, context, call.finish())
        answer = _object(context, call, [_choice(choice, choice.text) for choice in choices])
        return JSONResponse({**answer, "usage": call.usage})


async def _events(context: Context, body: CompletionBody, call: Call) -> AsyncIterator[str]:
    usage: dict[str, Any] = {"usage": None} if body.include_usage else {}
    try:
        async for choice, output in call.outputs():
            if output.text or output.finish_reason:
                yield encode_event({**_object(context, call, [_choice(choice, output.text)]), **usage})
        if body.include_usage:
            yield encode_event({**_object(context, call, []), "usage": call.usage})
    except ApiError as error:
        yield encode_event(error.body())
    yield DONE


def _object(context: Context, call: Call, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "object": "text_completion",
        "created": call.created,
        "model": context.info.name,
        "system_fingerprint": context.info.fingerprint,
        "choices": choices,
    }


def _choice(choice: Choice, text: str) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": choice.finish_reason}
