"""Log-probabilities of tokens, from the network's own distribution: before temperature, penalties and filters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.evaluate.perplexity import LOGIT_ROWS

BLOCK = 256
"""Logits of which the highest is looked for at once."""


class TokenLogprobs(NamedTuple):
    """A token and how likely it was where it stands.

    logprob: natural logarithm of its probability
    top:     the most likely tokens there with theirs, the most likely first; as many as were asked for
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Those of ``token_ids`` (n), and of the ``num_top`` most likely tokens, under ``logits`` (n, vocab_size)."""
    if not token_ids:
        return []
    log_total = logits.logsumexp(-1, keepdim=True)
    wanted = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = (logits.gather(-1, wanted) - log_total)[:, 0].tolist()
    if not num_top:
        return [TokenLogprobs(token, value) for token, value in zip(token_ids, chosen, strict=True)]
    highest, best = _highest(logits, min(num_top, logits.shape[-1]))
    values, tokens = (highest - log_total).tolist(), best.tolist()
    tops = [tuple(zip(*row, strict=True)) for row in zip(tokens, values, strict=True)]
    return [TokenLogprobs(*item) for item in zip(token_ids, chosen, tops, strict=True)]


def _highest(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The ``number`` highest values of each row of ``logits`` (n, vocab_size), from high to low, and their columns.

    On a CPU, torch looks for them one value at a time. They lie in as many blocks, those with the highest maxima, and
    maxima are found by vectors of values.
    """
    num_blocks = logits.shape[-1] // BLOCK
    if logits.device.type != "cpu" or num_blocks <= number:
        best = logits.topk(number, dim=-1)
        return best.values, best.indices
    maxima = logits[:, : num_blocks * BLOCK].reshape(-1, num_blocks, BLOCK).amax(-1)
    blocks = maxima.topk(number, dim=-1).indices
    columns = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(num_blocks * BLOCK, logits.shape[-1]).expand(len(logits), -1)
    columns = torch.cat([columns, rest], dim=-1)
    best = logits.gather(-1, columns).topk(number, dim=-1)
    return best.values, columns.gather(-1, best.indices)


@torch.inference_mode()
def score_rows(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """``logprobs_of`` under ``logits(hidden)``, ``hidden`` (n, hidden_size), with few rows of logits alive at once."""
    scores: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        scores += logprobs_of(logits(hidden[rows]), token_ids[rows], num_top)
    return scores
