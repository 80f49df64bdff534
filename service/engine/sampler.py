"""From logits to one token per request: greedy, or drawn from a filtered distribution.

Drawing is by inversion: the token is the first whose cumulative probability exceeds one uniform number in [0, 1) from
the request's own generator. So a request uses exactly one number per token, a seeded one gives the same text in any
batch and on any device, and the distribution can be checked exactly without statistics.
The filters act in the order min_p, top_k, top_p, each on what the one before it left, renormalized.

On a CPU, torch sorts and compares one number at a time where NumPy does a vector of them, and sorting a vocabulary
takes as long as a small network: there NumPy finds the highest logits, and only tokens that may pass are sorted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .logprobs import TokenLogprobs, logprobs_of
from .request import Request, SamplingParams

_Weights: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"
_TokenIds: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


class Candidates(NamedTuple):
    """What each row's next token is drawn from.

    token_ids: (n, width) int64, from low to high
    weights:   (n, width) float64, in proportion to the probabilities; a token of weight zero is none
    """

    token_ids: Tensor
    weights: Tensor


class Sampled(NamedTuple):
    """A request's next token, None where there is no distribution to draw from; with logprobs where they are wanted."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


def sample_with_logprobs(logits: Tensor, requests: Sequence[Request]) -> list[Sampled]:
    """``sample``, with log-probabilities under ``logits`` as they are given for requests that want them."""
    rows = [row for row, request in enumerate(requests) if request.params.num_logprobs is not None]
    if not rows:
        return [Sampled(token) for token in sample(logits, requests)]
    given = logits[rows]
    sampled = [Sampled(token) for token in sample(logits, requests)]
    numbers = [requests[row].params.num_logprobs or 0 for row in rows]
    # A row without a token is scored too, as token 0: what comes of it is dropped.
    scores = logprobs_of(given, [sampled[row].token_id or 0 for row in rows], max(numbers))
    for row, score, number in zip(rows, scores, numbers, strict=True):
        if sampled[row].token_id is not None:
            sampled[row] = Sampled(sampled[row].token_id, score._replace(top=score.top[:number]))
    return sampled


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """The next token of each of ``requests`` from its row of ``logits`` (num_requests, vocab_size) float32.

    None where the row holds NaN or infinity, or no token that its request allows: there is no distribution to draw
    from. Rows of requests with a ``logits_processor`` are written over.
    A request may have several rows if its processor does not need the token of one row for the next: each row takes one
    number from the request's generator, in the order of the rows.
    """
    process(logits, requests)
    tokens = most_likely(logits)
    uniforms = {
        row: requests[row].rng.random()
        for row, token in enumerate(tokens)
        if token is not None and not requests[row].params.is_greedy
    }
    # Apart, since rows without a filter are as wide as the vocabulary.
    for has_filter in (False, True):
        rows = [row for row in uniforms if requests[row].params.has_filter is has_filter]
        if rows:
            found = candidates(logits[rows], [requests[row].params for row in rows])
            columns = draw(found.weights, [uniforms[row] for row in rows])
            for row, token in zip(rows, found.token_ids.gather(-1, columns[:, None])[:, 0].tolist(), strict=True):
                tokens[row] = token
    return tokens


def process(logits: Tensor, requests: Sequence[Request]) -> None:
    """Let each request that has a ``logits_processor`` change its row of ``logits`` (n, vocab_size), in place."""
    for row, request in enumerate(requests):
        if request.logits_processor is not None:
            values = logits[row].cpu()
            request.logits_processor.apply(values.numpy(), request.output_token_ids)
            if logits.device.type != "cpu":
                with torch.inference_mode():  # logits come from a step, which allows no other writing
                    logits[row] = values.to(logits.device)


def most_likely(logits: Tensor) -> list[int | None]:
    """Token of the highest of each row's ``logits`` (n, vocab_size), the first of equals; None where one is not finite.

    NaN and infinity win every comparison: where a row holds one, it is what is found. Tokens at minus infinity are
    masked; a row of nothing else has no token.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        tokens = rows.argmax(-1).tolist()
        highest = [rows.item(row, token) for row, token in enumerate(tokens)]
    else:
        best = logits.argmax(-1)
        tokens, highest = best.tolist(), logits.gather(-1, best[:, None])[:, 0].tolist()
    return [token if math.isfinite(value) else None for token, value in zip(tokens, highest, strict=True)]


def candidates(logits: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """The tokens of each row of ``logits`` (n, vocab_size) that its filters leave, and their weights."""
    weights = logits.double() - logits.amax(-1, keepdim=True)
    weights.div_(_column([item.temperature for item in params], logits.device)).exp_()
    if not any(item.has_filter for item in params):
        return Candidates(torch.arange(weights.shape[-1], device=weights.device).expand_as(weights), weights)
    if any(item.min_p > 0.0 for item in params):
        weights.masked_fill_(weights < _column([item.min_p for item in params], weights.device), 0.0)
    whole = weights.sum(-1, keepdim=True)
    found = _shortlist(weights, whole, params)
    return found._replace(weights=_filter(found.weights, whole, params))


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Column (n,) int64 of each row of ``weights`` (n, width) at its ``uniforms`` in [0, 1).

    Rows need not sum to one; a column of weight zero is never chosen.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the product to the total itself, past the last token.
    targets = torch.minimum(_column(uniforms, weights.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def _shortlist(weights: Tensor, whole: Tensor, params: Sequence[SamplingParams]) -> Candidates:
    """The tokens of each row of ``weights`` (n, vocab_size) but for those that top_k or top_p drops for sure.

    On other devices than a CPU, all of them: there it takes longer to collect a few than to sort them all.
    whole: (n, 1), sum of each row
    """
    if weights.device.type != "cpu":
        return Candidates(torch.arange(weights.shape[-1], device=weights.device).expand_as(weights), weights)
    token_ids = [
        torch.from_numpy(_top_k(row, item.top_k) if item.top_k else _around_nucleus(row, item.top_p * total))
        for row, total, item in zip(weights.numpy(), whole[:, 0].tolist(), params, strict=True)
    ]
    shortest = [row[tokens] for row, tokens in zip(weights, token_ids, strict=True)]
    return Candidates(pad_sequence(token_ids, batch_first=True), pad_sequence(shortest, batch_first=True))


def _top_k(weights: _Weights, top_k: int) -> _TokenIds:
    """The ``top_k`` heaviest tokens, and all that are equal to the last of them."""
    least = np.partition(weights, -top_k)[-top_k] if top_k < len(weights) else 0.0
    return np.flatnonzero(weights >= least)


def _around_nucleus(weights: _Weights, mass: float) -> _TokenIds:
    """All tokens above some weight, which hold ``mass`` or more together: there are no others in its nucleus."""
    rest = weights.sum() - mass
    for most in (256, 4096, len(weights)):  # so many tokens that are not above it hold no more than the rest
        token_ids = np.flatnonzero(weights > rest / most)
        if weights[token_ids].sum() >= mass:
            return token_ids
    return np.flatnonzero(weights)


def _filter(weights: Tensor, whole: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Candidates' ``weights`` (n, width) with zeros for those that top_k and top_p drop.

    whole: (n, 1), sum over the vocabulary
    """
    width, device = weights.shape[-1], weights.device
    ranked = _descending(weights)
    top_k = _column([item.top_k or math.inf for item in params], device)
    ranked = ranked.masked_fill(torch.arange(width, device=device) >= top_k, 0.0)
    whole = torch.where(top_k.isinf(), whole, ranked.sum(-1, keepdim=True))
    # A token stays while those before it do not hold top_p yet: the one that crosses the line is kept.
    before = ranked.cumsum(-1) - ranked
    top_p = _column([item.top_p for item in params], device)
    ranked = ranked.masked_fill((before >= top_p * whole) & (top_p < 1.0), 0.0)
    num_kept = (ranked > 0.0).sum(-1, keepdim=True)
    least = ranked.gather(-1, num_kept - 1)
    # Among equals the lowest token ids stay, and exactly as many as were kept.
    num_equal = num_kept - (ranked > least).sum(-1, keepdim=True)
    is_equal = weights == least
    is_dropped = (weights < least) | (is_equal & (is_equal.cumsum(-1) > num_equal))
    return weights.masked_fill(is_dropped, 0.0)


def _descending(values: Tensor) -> Tensor:
    """Each row of ``values`` (n, width) from high to low."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
