"""Sampling where requests may have drafts: row after row, as long as what is sampled is what was drafted.

A request with a draft of k tokens has 1 + k rows of logits: of its newest token, and of each token of the draft. The
first row gives its next token in any case. Is that the draft's first token, then the second row is computed from what
the request now holds and gives its next token as well, and so on: up to the first disagreement each row is what a step
of its own would have computed, and each token takes its random number in turn. Text and generator are those without
drafts.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from .request import Request
from .scheduler import ScheduledRequest

T = TypeVar("T")


def sample_drafts(
    logits: Tensor,
    scheduled: Sequence[ScheduledRequest],
    sample: Callable[[Tensor, list[Request]], list[T]],
    token_of: Callable[[T], int | None],
) -> list[tuple[Request, T]]:
    """What each request gets, in the order of ``scheduled``: several times in a row for one whose draft agrees.

    Args:
        logits: (n, vocab_size), the rows of each request that gets a token, one behind the other.
        scheduled: the step.
        sample: from rows and their requests to what is sampled from each.
        token_of: its token; None: there is none, and none follow.
    """
    items = [item for item in scheduled if item.gets_token]
    if len(logits) == len(items):
        requests = [item.request for item in items]
        return list(zip(requests, sample(logits, requests), strict=True))
    first_rows, num_rows = [], 0
    for item in items:
        first_rows.append(num_rows)
        num_rows += 1 + len(item.draft)
    sampled: list[list[T]] = [[] for _ in items]
    going = list(range(len(items)))
    for depth in range(1 + max(len(item.draft) for item in items)):
        results = sample(logits[[first_rows[i] + depth for i in going]], [items[i].request for i in going])
        for i, result in zip(going, results, strict=True):
            sampled[i].append(result)
        going = [
            i
            for i, result in zip(going, results, strict=True)
            if depth < len(items[i].draft) and token_of(result) == items[i].draft[depth]
        ]
        if not going:
            break
    return [(item.request, result) for item, results in zip(items, sampled, strict=True) for result in results]
