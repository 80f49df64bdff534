"""What stands around the choices of completions and chat completions, in answers and in the events of a stream."""

from typing import Any

from ..deps import Context
from .generation import Call
from .schemas import GenerationBody
from .sse import encode_event


def answer_of(context: Context, call: Call, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer of OpenAI's object ``kind``, or a part of one."""
    return {
        "id": call.call_id,
        "object": kind,
        "created": call.created,
        "model": context.info.name,
        "system_fingerprint": context.info.fingerprint,
        "choices": choices,
    }


def choice_event(context: Context, body: GenerationBody, call: Call, kind: str, choice: dict[str, Any]) -> bytes:
    """An event with a part of one choice; where the stream ends with the usage, it has that field too."""
    answer = answer_of(context, call, kind, [choice])
    if body.include_usage:
        answer["usage"] = call.usage if body.usage_in_every_event else None
    return encode_event(answer)


def usage_event(context: Context, call: Call, kind: str) -> bytes:
    """The event that ends a stream with its usage."""
    return encode_event({**answer_of(context, call, kind, []), "usage": call.usage})
