"""``POST /v1/chat/completions``."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from models.errors import QerveError

from ..deps import Context, ContextDep, json_body
from ..errors import ApiError, bad_request, internal_error
from .admission import admit_prompts
from .generation import Call, Choice, max_tokens_for, start, stream, tokenize, unless_disconnected
from .schemas import ChatBody, ChatMessage
from .sse import DONE, encode_event

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(
    request: Request, context: ContextDep, body: Annotated[ChatBody, Depends(json_body(ChatBody))]
) -> Response:
    """Write the assistant's next message, ``n`` times."""
    body.check()
    context.check_model(body.model)
    with ExitStack() as stack:
        text = "".join(message.content for message in body.messages)
        generation = admit_prompts(request, context, [text], body.n or 1)
        stack.callback(generation.close)
        prompt = await asyncio.to_thread(render, context, body.messages)
        # The template writes the special tokens itself.
        rows = await tokenize(context, [prompt], "messages", add_special_tokens=False)
        limit = max_tokens_for(context, len(rows[0]), body.requested_tokens, None)
        context.metrics.request_accepted(body.n or 1)
        call = Call(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), len(rows[0]), generation)
        start(call, body, rows, [limit])
        if body.stream:
            return stream(context, _events(context, body, call), stack.pop_all().close)
        choices = await unless_disconnected(request, context, call.finish())
        answer = _object(context, call, "chat.completion", [_message(choice) for choice in choices])
        return JSONResponse({**answer, "usage": call.usage})


def render(context: Context, messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
    """The conversation as the model's chat template writes it; ``developer`` is OpenAI's newer name of ``system``.

    Raises:
        ApiError: 400, there is no template or it rejects the messages; 500, it cannot be used.
    """
    tokenizer = context.loaded.tokenizer
    if not tokenizer.has_chat_template:
        raise bad_request("This model has no chat template: use /v1/completions.")
    roles = {"developer": "system"}
    conversation = [{"role": roles.get(item.role, item.role), "content": item.content} for item in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt)
    except ValueError as error:
        raise bad_request(f"messages: {error}.", "messages") from None
    except QerveError as error:
        raise internal_error(f"The model's chat template cannot be used: {error}.") from None


async def _events(context: Context, body: ChatBody, call: Call) -> AsyncIterator[str]:
    usage: dict[str, Any] = {"usage": None} if body.include_usage else {}

    def event(choices: list[dict[str, Any]]) -> str:
        return encode_event({**_object(context, call, "chat.completion.chunk", choices), **usage})

    try:
        for choice in call.choices.values():
            yield event([_delta(choice, {"role": "assistant", "content": ""})])
        async for choice, output in call.outputs():
            if output.text:
                yield event([_delta(choice, {"content": output.text})])
            if output.finish_reason:
                yield event([{**_delta(choice, {}), "finish_reason": output.finish_reason}])
        if body.include_usage:
            yield encode_event({**_object(context, call, "chat.completion.chunk", []), "usage": call.usage})
    except ApiError as error:
        yield encode_event(error.body())
    yield DONE


def _object(context: Context, call: Call, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "object": kind,
        "created": call.created,
        "model": context.info.name,
        "system_fingerprint": context.info.fingerprint,
        "choices": choices,
    }


def _message(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None,
        "finish_reason": choice.finish_reason,
    }


def _delta(choice: Choice, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
