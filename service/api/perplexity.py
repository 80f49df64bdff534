"""``POST /v1/perplexity``: how well the served model predicts a text, window by window between generation steps."""

import asyncio
import math
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from models.errors import EvaluationError
from models.evaluate.perplexity import PerplexityResult, Window, plan_windows, score_window, summarize

from ..deps import Context, ContextDep, json_body
from ..engine.async_engine import DrainingError
from ..errors import bad_request, internal_error
from .generation import admit, check_token_ids, draining, unless_disconnected
from .schemas import PerplexityBody

DEFAULT_WINDOW = 1024

router = APIRouter()


@router.post("/v1/perplexity", summary="Score a text")
async def perplexity(
    request: Request, context: ContextDep, body: Annotated[PerplexityBody, Depends(json_body(PerplexityBody))]
) -> Response:
    """Negative log-likelihood (nats per token) and perplexity of a text or of token ids."""
    body.check()
    context.check_model(body.model)
    with ExitStack() as stack:
        stack.callback(admit(context, 1).close)
        tokens = await _tokens(context, body)
        windows = _plan(context, body, len(tokens))
        result = await unless_disconnected(request, context, _score(context, tokens, windows))
    if not math.isfinite(result.nll):
        context.metrics.logits_not_finite()
        raise internal_error("The model produced values that are not finite.")
    context.metrics.perplexity_scored(result.num_tokens)
    return JSONResponse(_answer(context, body, result))


async def _tokens(context: Context, body: PerplexityBody) -> torch.Tensor:
    if body.text is not None:
        token_ids, param = await asyncio.to_thread(context.loaded.tokenizer.encode, body.text), "text"
    else:
        token_ids, param = body.token_ids or [], "token_ids"
    check_token_ids(context, token_ids, param)
    return torch.tensor(token_ids, dtype=torch.int64)


def _plan(context: Context, body: PerplexityBody, num_tokens: int) -> list[Window]:
    context_len = context.info.max_model_len
    window = body.window or min(DEFAULT_WINDOW, context_len)
    stride = body.stride or window
    if window > context_len:
        raise bad_request(
            f"window {window} is more than the context of {context_len} tokens.", "window", n_ctx=context_len
        )
    if stride > window:
        raise bad_request(f"stride {stride} is more than the window of {window} tokens.", "stride")
    # Counted before it is made: a long text at stride 1 has as many windows as tokens.
    num_windows = 1 + max(0, -(-(num_tokens - window) // stride))
    most = context.settings.max_perplexity_windows
    if min(num_windows, body.max_windows or num_windows) > most:
        message = (
            f"{num_tokens} tokens at stride {stride} make {num_windows} windows; this server scores at most {most}."
        )
        raise bad_request(f"{message} Raise stride or set max_windows.", "stride")
    try:
        return plan_windows(num_tokens, window, stride, body.max_windows)
    except EvaluationError as error:
        raise bad_request(str(error), "text" if body.text is not None else "token_ids") from None


async def _score(context: Context, tokens: torch.Tensor, windows: list[Window]) -> PerplexityResult:
    model = context.loaded.model
    nlls = []
    for window in windows:
        job = partial(score_window, model, tokens[window.start : window.end], window.num_scored)
        try:
            nlls.append(await context.engine.call(job))
        except DrainingError:
            raise draining(context) from None
    return summarize(nlls)


def _answer(context: Context, body: PerplexityBody, result: PerplexityResult) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "object": "perplexity",
        "model": context.info.name,
        "system_fingerprint": context.info.fingerprint,
        "nll": result.nll,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "num_tokens": result.num_tokens,
        "num_windows": result.num_windows,
    }
    if body.return_token_nlls:
        answer["token_nlls"] = result.token_nlls.tolist()
    return answer
