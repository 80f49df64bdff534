"""Token perplexity over windows, in bounded memory: one function for ``qerve eval`` and ``POST /v1/perplexity``.

A window of n tokens is one forward pass from position 0. With ``stride == window`` the windows do not overlap and each
scores its n - 1 predictions. With a smaller stride, a window scores only the tokens that no window before it scored, so
that every token but the very first is scored once, with at least ``window - stride`` tokens of context.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EvaluationError
from ..llama.batch import Batch

LOGIT_ROWS = 64
"""Rows of logits alive at once: 64 x 49152 in float32 are 13 MB, where a window of 1024 would be 200 MB."""


class LanguageModel(Protocol):
    """What scoring needs of a network."""

    @property
    def device(self) -> torch.device:
        """Where the token ids must be."""
        ...

    def __call__(self, batch: Batch) -> Tensor:
        """Final hidden states (num_tokens, hidden_size)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden_size) -> (n, vocab_size) float32."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start .. end`` (exclusive) are fed; the last ``num_scored`` of them are scored."""

    start: int
    end: int
    num_scored: int


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """nll: mean in nats per scored token; token_nlls: (num_tokens,) float32 in text order."""

    nll: float
    num_tokens: int
    num_windows: int
    token_nlls: Tensor

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite when that does not fit a float."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def plan_windows(num_tokens: int, window: int, stride: int, max_windows: int | None = None) -> list[Window]:
    """The windows over ``num_tokens`` tokens, of which only the last may be shorter; ``max_windows`` keeps the first.

    Raises:
        EvaluationError: fewer than two tokens, or sizes out of range.
    """
    if num_tokens < 2:
        raise EvaluationError(f"perplexity needs at least 2 tokens, the text has {num_tokens}: give a longer text")
    if window < 2 or not 1 <= stride <= window:
        raise EvaluationError(f"window {window} and stride {stride}: choose window >= 2 and 1 <= stride <= window")
    windows, scored_until = [], 0
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        num_scored = end - max(scored_until, start + 1)
        if num_scored > 0:
            windows.append(Window(start, end, num_scored))
        scored_until = end
        if end == num_tokens:
            break
    return windows[:max_windows]


@torch.inference_mode()
def score_window(model: LanguageModel, token_ids: Tensor, num_scored: int) -> Tensor:
    """nll (num_scored,) float32 of the last ``num_scored`` of ``token_ids`` (num_tokens,) int64."""
    token_ids = token_ids.to(model.device)
    hidden = model(Batch.uncached(token_ids[None], model.device))
    return score_hidden(model.logits, hidden[-num_scored - 1 : -1], token_ids[-num_scored:])


def score_hidden(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (n,) float32 of ``targets`` (n,) under ``logits(hidden)``, ``LOGIT_ROWS`` at a time."""
    starts = range(0, len(targets), LOGIT_ROWS)
    pieces = ((hidden[start : start + LOGIT_ROWS], targets[start : start + LOGIT_ROWS]) for start in starts)
    return torch.cat([F.cross_entropy(logits(rows), target, reduction="none") for rows, target in pieces]).float().cpu()


def summarize(token_nlls: Sequence[Tensor]) -> PerplexityResult:
    """Pool the nlls of several windows; the mean is taken in float64 over tokens, not over windows."""
    pooled = torch.cat(list(token_nlls))
    return PerplexityResult(pooled.double().mean().item(), pooled.numel(), len(token_nlls), pooled)


def perplexity(
    model: LanguageModel,
    token_ids: Sequence[int],
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of ``token_ids``; ``on_window(done, total)`` reports progress.

    Raises:
        EvaluationError: fewer than two tokens, or sizes out of range.
    """
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    windows = plan_windows(len(tokens), window, stride or window, max_windows)
    nlls = []
    for done, item in enumerate(windows, start=1):
        nlls.append(score_window(model, tokens[item.start : item.end], item.num_scored))
        if on_window is not None:
            on_window(done, len(windows))
    return summarize(nlls)
