"""From logits to one token per request: greedy, or drawn from a filtered distribution.

Drawing is by inversion: the token is the first whose cumulative probability exceeds one uniform number in [0, 1) from
the request's own generator. So a request uses exactly one number per token, a seeded one gives the same text in any
batch and on any device, and the distribution can be checked exactly without statistics.
The filters act in the order min_p, top_k, top_p, each on what the one before it left, renormalized.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Request, SamplingParams


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """The next token of each of ``requests`` from its row of ``logits`` (num_requests, vocab_size) float32.

    None where the row holds NaN or infinity: there is no distribution to draw from.
    """
    tokens = most_likely(logits)
    # NaN and infinity win every comparison: where a row holds one, it is what was found.
    is_finite = logits.gather(-1, tokens[:, None]).isfinite()[:, 0].tolist()
    drawn = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [requests[row] for row in drawn]
        probs = probabilities(logits[rows], [request.params for request in chosen])
        tokens[rows] = draw(probs, [request.rng.random() for request in chosen])
    return [token if ok else None for token, ok in zip(tokens.tolist(), is_finite, strict=True)]


def most_likely(logits: Tensor) -> Tensor:
    """Token (n,) int64 of the highest of each row's ``logits`` (n, vocab_size): the first of equals, NaN above all."""
    if logits.device.type == "cpu":  # torch compares one number at a time there, NumPy a vector
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Distribution (n, vocab_size) float64 that each row of ``logits`` is drawn from, filters applied."""
    temperature = _column([item.temperature for item in params], logits.device)
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    filtered = [row for row, item in enumerate(params) if item.has_filter]
    if filtered:
        rows = torch.tensor(filtered, device=logits.device)
        probs[rows] = _filter(probs[rows], [params[row] for row in filtered])
    return probs


def draw(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Token (n,) int64 of each row of ``probs`` (n, vocab_size) at its ``uniforms`` in [0, 1).

    Rows need not sum to exactly one; a token of probability zero is never chosen.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the product to the total itself, past the last token.
    targets = torch.minimum(_column(uniforms, probs.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def _filter(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    vocab_size, device = probs.shape[-1], probs.device
    # Stable, so that among equals the lowest token ids stay and exactly top_k are kept.
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(ranked < _column([item.min_p for item in params], device) * ranked[:, :1], 0.0)
    top_k = _column([item.top_k or vocab_size for item in params], device)
    ranked = ranked.masked_fill(torch.arange(vocab_size, device=device) >= top_k, 0.0)
    ranked = ranked / ranked.sum(-1, keepdim=True)
    # A token stays while those before it do not hold top_p yet: the one that crosses the line is kept.
    before = ranked.cumsum(-1) - ranked
    top_p = _column([item.top_p for item in params], device)
    ranked = ranked.masked_fill((before >= top_p) & (top_p < 1.0), 0.0)
    ranked = ranked / ranked.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
