"""``POST /tokenize`` and ``POST /detokenize``: between text and token ids, as vLLM spells it."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from ..deps import Context, ContextDep, json_body
from ..errors import bad_request
from .admission import admit
from .chat import render
from .generation import check_token_ids
from .schemas import MAX_MESSAGES, Body, ChatMessage, ModelName, TokenIdsField

router = APIRouter()


class TokenizeBody(Body):
    """``POST /tokenize``: ``prompt`` or ``messages``.

    add_special_tokens: between the markers that the model was trained with; unset: for a prompt, since a chat template
                        writes them itself
    """

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "continue_final_message": (None, False),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "tools": (None, []),
        "mm_processor_kwargs": (None, {}),
    }

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise 400 unless exactly one of ``prompt`` and ``messages`` is given."""
        self.refuse_unsupported()
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt")


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: ModelName | None = None
    tokens: TokenIdsField


@router.post("/tokenize", summary="Text or messages as token ids")
async def tokenize(
    request: Request, context: ContextDep, body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))]
) -> dict[str, Any]:
    """Token ids of a text, or of messages in the model's chat template; also of those that are longer than the context.

    The call holds a seat like any other, so that tokenizing has its bounds too.
    """
    body.check()
    context.check_model(body.model)
    generation = admit(request, context, 1, 0)
    try:
        tokens = await asyncio.to_thread(_encode, context, body)
    finally:
        generation.close()
    strings = context.loaded.tokenizer.token_strings(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": context.info.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }


@router.post("/detokenize", summary="Token ids as text")
async def detokenize(
    request: Request, context: ContextDep, body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))]
) -> dict[str, str]:
    """Text of token ids, special tokens included."""
    context.check_model(body.model)
    if body.tokens:
        check_token_ids(context, body.tokens, "tokens")
    generation = admit(request, context, 1, 0)
    try:
        text = await asyncio.to_thread(context.loaded.tokenizer.decode, body.tokens, skip_special_tokens=False)
    finally:
        generation.close()
    return {"prompt": text}


def _encode(context: Context, body: TokenizeBody) -> list[int]:
    tokenizer = context.loaded.tokenizer
    if body.messages is None:
        return tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    text = render(context, body.messages, body.add_generation_prompt is not False)
    return tokenizer.encode(text, bool(body.add_special_tokens))
