"""``POST /v1/perplexity``: how well the served model predicts a text, in windows that are scheduled like prompts."""

import asyncio
import math
import uuid
from contextlib import ExitStack
from itertools import chain, islice
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from models.artifact.format import Probe
from models.errors import EvaluationError
from models.evaluate.perplexity import PerplexityResult, Window, plan_windows, summarize

from ..deps import Context, ContextDep, json_body
from ..engine.detokenizer import Detokenizer
from ..engine.generation import Generation
from ..engine.request import FinishReason, SamplingParams
from ..engine.request import Request as EngineRequest
from ..errors import bad_request, internal_error
from .admission import admit, estimate_tokens
from .generation import check_token_ids, unless_disconnected
from .rank import check_rank, rank_in_engine, rank_of, with_rank
from .schemas import PerplexityBody

DEFAULT_WINDOW = 1024
MAX_TOGETHER = 4
TOKENS_TOGETHER = 512

router = APIRouter()


@router.post("/v1/perplexity", summary="Score a text")
async def perplexity(
    request: Request, context: ContextDep, body: Annotated[PerplexityBody, Depends(json_body(PerplexityBody))]
) -> Response:
    """Negative log-likelihood (nats per token) and perplexity of a text, of token ids, or of the artifact's probe.

    Of the probe, the answer also has what the build measured of the dense network and of the quantized one.
    """
    body.check()
    context.check_model(body.model)
    check_rank(context, body.rank)
    with ExitStack() as stack:
        # However many windows there are, the call counts as one sequence: it waits in the queue once.
        num_tokens = min(estimate_tokens(body.text or body.token_ids or []), TOKENS_TOGETHER)
        call = admit(request, context, 1, num_tokens, keeps_seats=True)
        stack.callback(call.close)
        tokens = await _tokens(context, body)
        windows = _plan(context, body, len(tokens))
        rank = rank_of(context, body.rank, 1, is_scored=True)
        score = _score(context, call, tokens, windows, rank_in_engine(context, rank))
        result = await unless_disconnected(request, context, score)
        answer = _answer(context, body, result)
        if body.return_tokens:
            answer["tokens"] = await asyncio.to_thread(_scored_tokens, context, tokens, windows, result)
    return with_rank(JSONResponse(answer), rank)


async def _tokens(context: Context, body: PerplexityBody) -> list[int]:
    if body.text is not None:
        token_ids, param = await asyncio.to_thread(context.loaded.tokenizer.encode, body.text), "text"
    elif body.token_ids is not None:
        token_ids, param = body.token_ids, "token_ids"
    else:
        token_ids, param = list(_probe(context).token_ids), "probe"
    check_token_ids(context, token_ids, param)
    return token_ids


def _probe(context: Context) -> Probe:
    probe = context.info.manifest.probe
    if probe is None:
        raise bad_request("The artifact holds no probe: its build had no holdout. Give text or token_ids.", "probe")
    return probe


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


async def _score(
    context: Context, call: Generation, tokens: list[int], windows: list[Window], rank: int | None
) -> PerplexityResult:
    """Every window as a request that generates nothing; the next one starts when one is done.

    Raises:
        ApiError: 500, the engine failed on a window.
    """
    waiting = (_request(tokens, window, call.arrival_seconds, rank) for window in windows)
    nlls: dict[str, list[float]] = {}  # in the order of the windows, since they start in it

    def start(num_windows: int) -> None:
        requests = list(islice(waiting, num_windows))
        nlls.update((request.request_id, []) for request in requests)
        call.start(requests)

    start(_num_together(windows))
    async for output in call.outputs():
        if output.finish_reason is FinishReason.ERROR:
            raise internal_error(f"Scoring failed: {output.error}.")
        nlls[output.request_id] += [-score.logprob for score in output.prompt_logprobs]
        if output.finish_reason is not None:
            start(1)
    context.metrics.perplexity_scored(sum(map(len, nlls.values())))
    return summarize([torch.tensor(values) for values in nlls.values()])


def _num_together(windows: list[Window]) -> int:
    """Windows of one call that are in the engine at the same time: one, or enough short ones to fill a step."""
    return max(1, min(MAX_TOGETHER, TOKENS_TOGETHER // (windows[0].end - windows[0].start), len(windows)))


def _request(tokens: list[int], window: Window, arrival_seconds: float, rank: int | None) -> EngineRequest:
    params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
    score_from = window.end - window.start - window.num_scored
    token_ids = tokens[window.start : window.end]
    return EngineRequest(uuid.uuid4().hex, token_ids, params, arrival_seconds, score_from, rank=rank)


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
    if body.probe:
        answer["probe"] = _comparison(_probe(context), result)
    if body.return_token_nlls:
        answer["token_nlls"] = result.token_nlls.tolist()
    return answer


def _scored_tokens(
    context: Context, tokens: list[int], windows: list[Window], result: PerplexityResult
) -> list[dict[str, Any]]:
    """Every token that a window holds: their texts, joined, are the text."""
    detokenizer = Detokenizer(context.loaded.tokenizer, (), skip_special_tokens=False)
    texts = [detokenizer.push(token) for token in tokens[: windows[-1].end]]
    texts[-1] += detokenizer.flush()
    positions = chain.from_iterable(range(item.end - item.num_scored, item.end) for item in windows)
    nlls = dict(zip(positions, result.token_nlls.tolist(), strict=True))
    return [{"text": text, "nll": nlls.get(position)} for position, text in enumerate(texts)]


def _comparison(probe: Probe, result: PerplexityResult) -> dict[str, float]:
    """Perplexities of the probe as the build measured them, and how far the served model is from the dense network."""
    dense = math.exp(probe.dense_nll)
    return {
        "dense_perplexity": dense,
        "quantized_perplexity": math.exp(probe.quantized_nll),
        "delta_to_dense": result.perplexity - dense,
        "ratio_to_dense": result.perplexity / dense,
    }
