"""``POST /v1/chat/completions``."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from models.errors import QerveError

from ..deps import Context, ContextDep, json_body
from ..errors import ApiError, bad_request, internal_error
from .admission import admit_prompts
from .envelope import answer_of, choice_event, usage_event
from .generation import Call, Choice, max_tokens_for, start, stream, tokenize, unless_disconnected
from .rank import check_rank, with_rank
from .sampling import sampling_of
from .schemas import ChatBody, ChatMessage
from .sse import DONE, encode_event
from .token_logprobs import chat_logprobs

CHUNK = "chat.completion.chunk"

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(
    request: Request, context: ContextDep, body: Annotated[ChatBody, Depends(json_body(ChatBody))]
) -> Response:
    """Write the assistant's next message, ``n`` times."""
    body.check()
    context.check_model(body.model)
    check_rank(context, body.rank)
    with ExitStack() as stack:
        text = "".join(message.content for message in body.messages)
        generation = admit_prompts(request, context, [text], body.n or 1)
        stack.callback(generation.close)
        prompt = await asyncio.to_thread(_prompt, context, body)
        # The template writes the special tokens itself.
        is_marked = bool(body.add_special_tokens)
        rows = await tokenize(context, [prompt], "messages", is_marked, body.truncate_prompt_tokens)
        limit = max_tokens_for(context, len(rows[0]), body.requested_tokens, None)
        sampling = await sampling_of(context, body)
        context.metrics.request_accepted(body.n or 1)
        call = Call(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), len(rows[0]), generation)
        start(context, call, body, sampling, rows=rows, max_tokens=[limit])
        if body.stream:
            return with_rank(stream(context, _events(context, body, call), stack.pop_all().close), call.rank)
        choices = await unless_disconnected(request, context, call.finish())
        answer = answer_of(context, call, "chat.completion", [_message(context, body, choice) for choice in choices])
        if body.return_token_ids:
            answer["prompt_token_ids"] = rows[0]
        return with_rank(JSONResponse({**answer, "usage": call.usage}), call.rank)


def _prompt(context: Context, body: ChatBody) -> str:
    """The text that the model continues."""
    if not body.continue_final_message:
        begins_message = body.add_generation_prompt is not False
        return render(context, body.messages, begins_message, body.chat_template_kwargs)
    prompt = render(context, body.messages, False, body.chat_template_kwargs)
    last = body.messages[-1].content.strip()
    place = prompt.rfind(last)
    if place < 0:
        raise bad_request("continue_final_message: the chat template changes the last message.", "messages")
    return prompt[: place + len(last)]


def render(
    context: Context,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's chat template writes it; ``developer`` is OpenAI's newer name of ``system``.

    variables: further ones for the template

    Raises:
        ApiError: 400, there is no template or it rejects the messages; 500, it cannot be used.
    """
    tokenizer = context.loaded.tokenizer
    if not tokenizer.has_chat_template:
        raise bad_request("This model has no chat template: use /v1/completions.")
    roles = {"developer": "system"}
    conversation = [{"role": roles.get(item.role, item.role), "content": item.content} for item in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt, variables)
    except ValueError as error:
        raise bad_request(f"messages: {error}.", "messages") from None
    except QerveError as error:
        raise internal_error(f"The model's chat template cannot be used: {error}.") from None


async def _events(context: Context, body: ChatBody, call: Call) -> AsyncIterator[bytes]:
    try:
        for choice in call.choices.values():
            yield choice_event(context, body, call, CHUNK, _delta(choice, {"role": "assistant", "content": ""}))
        async for choice, output in call.outputs():
            if output.text or choice.tokens.has_new or (body.return_token_ids and output.token_ids):
                delta = _delta(choice, {"content": output.text})
                delta |= _extras(context, body, choice, output.token_ids)
                yield choice_event(context, body, call, CHUNK, delta)
            if output.finish_reason:
                delta = {**_delta(choice, {}), "finish_reason": output.finish_reason}
                yield choice_event(context, body, call, CHUNK, delta)
        if body.include_usage:
            yield usage_event(context, call, CHUNK)
    except ApiError as error:
        yield encode_event(error.body())
    yield DONE


def _message(context: Context, body: ChatBody, choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        **_extras(context, body, choice, choice.token_ids),
        "finish_reason": choice.finish_reason,
    }


def _extras(context: Context, body: ChatBody, choice: Choice, token_ids: Sequence[int]) -> dict[str, Any]:
    """What is told of the tokens besides their text, those of them that were not told of before."""
    logprobs = None
    if body.num_logprobs is not None:
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = chat_logprobs(context.speller, choice.tokens.take(), as_ids)
    return {"logprobs": logprobs, **({"token_ids": list(token_ids)} if body.return_token_ids else {})}


def _delta(choice: Choice, delta: dict[str, str]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
