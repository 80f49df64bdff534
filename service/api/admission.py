"""From an HTTP request to its share of the engine, and what a client is told when there is none."""

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from ..deps import Context
from ..engine.admission import DrainingError, QueueFullError
from ..engine.generation import DeadlineExceededError, Generation
from ..errors import ApiError, bad_request, deadline_exceeded
from ..request_record import record_of
from .schemas import Prompt

RETRY_SECONDS = {"Retry-After": "1"}
CHARS_PER_TOKEN = 4
"""Of ordinary text: what a prompt is counted as until it is tokenized."""


def admit(
    request: HttpRequest, context: Context, num_sequences: int, num_tokens: int, *, keeps_seats: bool = False
) -> Generation:
    """Room for one call before any work is done for it, and its deadline; see ``AsyncEngine.admit``.

    Raises:
        ApiError: 400, this server can never run as many sequences together.
        QueueFullError, DrainingError: not now.
    """
    capacity = context.engine.admission.capacity
    if num_sequences > capacity:
        raise bad_request(f"{num_sequences} sequences in one request; this server takes {capacity}.")
    record = record_of(request.scope)
    generation = context.engine.admit(num_sequences, num_tokens, keeps_seats=keeps_seats)
    record.generation, generation.cache_salt = generation, record.cache_salt
    if record.remaining_seconds is not None:
        generation.expire_after(record.remaining_seconds)
    return generation


def admit_prompts(request: HttpRequest, context: Context, prompts: Sequence[Prompt], num_choices: int) -> Generation:
    """Room for ``num_choices`` outputs of each of ``prompts``.

    Raises:
        ApiError: 400, there are more of them than this server takes.
        QueueFullError, DrainingError: not now.
    """
    settings = context.settings
    if len(prompts) > settings.max_prompts:
        raise bad_request(f"{len(prompts)} prompts in one request; this server takes {settings.max_prompts}.", "prompt")
    if num_choices > settings.max_choices:
        raise bad_request(f"n is {num_choices}; this server takes {settings.max_choices}.", "n")
    num_tokens = num_choices * sum(estimate_tokens(prompt) for prompt in prompts)
    return admit(request, context, len(prompts) * num_choices, num_tokens)


def estimate_tokens(prompt: Prompt) -> int:
    """About how many tokens ``prompt`` has, without tokenizing it."""
    return len(prompt) // CHARS_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


def install_engine_handlers(app: FastAPI) -> None:
    """Answer what the engine refuses or gives up."""
    app.add_exception_handler(QueueFullError, _answer_queue_full)
    app.add_exception_handler(DrainingError, _answer_draining)
    app.add_exception_handler(DeadlineExceededError, _answer_deadline)


async def _answer_queue_full(request: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFullError)  # noqa: S101 registered for this class
    _context_of(request).metrics.rejected("kv_budget" if error.is_about_tokens else "queue_full")
    message = f"The queue is full. Try again in {error.retry_seconds} seconds."
    return ApiError(429, message, headers={"Retry-After": str(error.retry_seconds)}).response()


async def _answer_draining(request: HttpRequest, _: Exception) -> JSONResponse:
    _context_of(request).metrics.rejected("draining")
    return ApiError(503, "The server is shutting down.", headers=RETRY_SECONDS).response()


async def _answer_deadline(_: HttpRequest, __: Exception) -> JSONResponse:
    return deadline_exceeded().response()


def _context_of(request: HttpRequest) -> Context:
    context: Context = request.app.state.context
    return context
