"""What the endpoints share: the application's parts, and request bodies read with care."""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from models.artifact.load import LoadedModel

from .canary import Canary
from .engine.async_engine import AsyncEngine
from .engine.rank_policy import RankPolicy
from .errors import ApiError, bad_request, deadline_exceeded, quote
from .grammar import GrammarCompiler
from .keys import KeyRing
from .metrics import Metrics
from .model_info import ModelInfo
from .request_record import record_of
from .settings import Settings
from .token_speller import TokenSpeller

logger = logging.getLogger("qerve.http")

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds after which a client wants its request to end; it can shorten the server's own limit, not lengthen it."""
MAX_DISCARDED_BYTES = 16 << 20
MAX_SHOWN_PROBLEMS = 5
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of one application.

    max_prompt_chars: a longer prompt cannot fit the context, whatever its tokens are
    ranks:            how much of the corrections requests get that leave it open
    canary:           whether the model is what it was; None: nobody looks
    """

    settings: Settings
    loaded: LoadedModel
    info: ModelInfo
    engine: AsyncEngine
    metrics: Metrics
    max_prompt_chars: int
    grammars: GrammarCompiler
    speller: TokenSpeller
    keys: KeyRing
    ranks: RankPolicy
    canary: Canary | None = None

    @property
    def problem(self) -> str | None:
        """Why no requests should be sent here now; None: they may."""
        if not self.engine.is_ready:
            return "The server does not take requests now."
        return None if self.canary is None else self.canary.problem

    def check_model(self, name: str | None) -> None:
        """Raise 404 when a client asks for a model by a name that is not served here; no name means this one."""
        if name is not None and name != self.info.name:
            message = f"The model {quote(name)} does not exist here; this server has {quote(self.info.name)}."
            raise ApiError(404, message, "model")


def get_context(request: Request) -> Context:
    """The application's parts."""
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(get_context)]


def json_body(schema: type[M]) -> Callable[[Request, Context], Awaitable[M]]:
    """A dependency that reads the body as ``schema``; every defect of the body is a 4xx that says what is wrong."""

    async def read(request: Request, context: ContextDep) -> M:
        settings = context.settings
        record = record_of(request.scope)
        record.deadline_seconds = record.started_seconds + _timeout(request, settings.request_timeout_seconds)
        _check_content_type(request)
        try:
            async with asyncio.timeout(record.remaining_seconds):
                data = await _read_bytes(request, settings.max_body_bytes)
        except TimeoutError:
            context.metrics.deadline_exceeded()
            raise deadline_exceeded() from None
        values = parse_json(data, settings.max_json_depth)
        try:
            body = schema.model_validate(values)
        except ValidationError as error:
            raise _explain(error) from None
        if body.model_extra:
            names = ", ".join(quote(name) for name in list(body.model_extra)[:MAX_SHOWN_PROBLEMS])
            logger.debug("fields that are not known are ignored: %s", names)
        return body

    return read


def parse_json(data: bytes, max_depth: int) -> Any:
    """Strict JSON: valid UTF-8, finite numbers, bounded depth, no half surrogates.

    Raises:
        ApiError: 400, with what is wrong and where.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not valid UTF-8: {error.reason} at byte {error.start}.") from None
    try:
        values = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
    except json.JSONDecodeError as error:
        raise bad_request(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise bad_request(f"The body is nested deeper than {max_depth} levels.") from None
    except ValueError:  # an integer of thousands of digits
        raise bad_request("The body holds a number with too many digits.") from None
    _check_values(values, max_depth)
    return values


def _check_values(values: Any, max_depth: int) -> None:
    """Depth and text of everything in ``values``, without recursion."""
    level = [values]
    for _ in range(max_depth + 1):
        for item in level:
            if isinstance(item, str):
                _check_text(item)
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        level = []
        for item in containers:
            if isinstance(item, dict):
                level += item.keys()
                level += item.values()
            else:
                level += item
    raise bad_request(f"The body is nested deeper than {max_depth} levels.")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"A text of the body holds half a surrogate pair at character {error.start}: it is not valid Unicode."
        raise bad_request(message) from None


def _refuse_constant(name: str) -> float:
    raise bad_request(f"The body holds {name}; numbers must be finite.")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request(f"The body holds the number {quote(text)}; numbers must be finite.")
    return value


def _timeout(request: Request, longest: float) -> float:
    """Seconds that the request may take in all.

    Raises:
        ApiError: 400, the client's own limit is no number of seconds.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise bad_request(f"{TIMEOUT_HEADER} is {quote(given)}; give a number of seconds above 0.", TIMEOUT_HEADER)
    return min(seconds, longest)


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, f"The body has content type {quote(content_type)}; send application/json.")


async def _read_bytes(request: Request, limit: int) -> bytes:
    """The body; one that is too long is read on for a while, so that its sender gets to see the answer."""
    error = ApiError(413, f"The body is longer than {limit} bytes.", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit + MAX_DISCARDED_BYTES:
        raise error
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= limit:
                chunks.append(chunk)
            elif num_bytes > limit + MAX_DISCARDED_BYTES:
                break
    except ClientDisconnect:
        raise ApiError(499, "The client left while it sent its body.") from None
    if num_bytes > limit:
        raise error
    return b"".join(chunks)


def _explain(error: ValidationError) -> ApiError:
    """400 with every problem's field and reason; ``param`` names the first."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    shown = [f"{_place(item['loc'])}: {_reason(item['msg'])}" for item in problems[:MAX_SHOWN_PROBLEMS]]
    if len(problems) > MAX_SHOWN_PROBLEMS:
        shown.append(f"and {len(problems) - MAX_SHOWN_PROBLEMS} more")
    first = problems[0]["loc"]
    return bad_request("; ".join(shown), _place(first[:1]) if first else None)


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:64] for part in loc) or "body"


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")
