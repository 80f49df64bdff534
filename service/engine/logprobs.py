"""Log-probabilities of tokens, from the network's own distribution: before temperature, penalties and filters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.evaluate.perplexity import LOGIT_ROWS


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
    best = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    values, tokens = (best.values - log_total).tolist(), best.indices.tolist()
    tops = [tuple(zip(*row, strict=True)) for row in zip(tokens, values, strict=True)]
    return [TokenLogprobs(*item) for item in zip(token_ids, chosen, tops, strict=True)]


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
