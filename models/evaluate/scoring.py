"""Log-likelihood of continuations given their contexts: what every task and word-level perplexity are made of.

Requests are sorted by length and packed into ragged batches: neighbours of equal length share one attention call, and
nothing is padded. Requests with the same input, such as one-token answers to one question, share a forward pass. Logits
are computed for the scored rows only, ``LOGIT_ROWS`` at a time: a batch of 4096 tokens over a vocabulary of 128k would
otherwise take 2 GB.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EvaluationError
from ..llama.batch import Batch
from .perplexity import LOGIT_ROWS, LanguageModel

MAX_BATCH_TOKENS = 4096


class HasContextLength(Protocol):
    """A configuration that states the context the model was trained for."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens."""
        ...


class ContextModel(LanguageModel, Protocol):
    """A network that knows its context length."""

    @property
    def config(self) -> HasContextLength:
        """The network's shape."""
        ...


def context_length(model: ContextModel, wanted: int | None, name: str = "max_length") -> int:
    """``wanted`` tokens, or the model's context length where nothing is wanted.

    Raises:
        EvaluationError: more are wanted than the model was trained for; ``name`` is the option that asked for them.
    """
    longest = model.config.max_position_embeddings
    if wanted is not None and wanted > longest:
        raise EvaluationError(f"{name} {wanted} is more than the model's context of {longest} tokens: lower it")
    return longest if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class Request:
    """Score the token ids ``continuation`` (at least one) after the token ids ``context`` (at least one)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, max_length: int) -> tuple[int, ...]:
        """What is fed: all but the last token; of a request that is too long, its last ``max_length``."""
        return (self.context + self.continuation)[-(max_length + 1) : -1]

    def is_truncated(self, max_length: int) -> bool:
        """Whether ``inputs`` lacks the beginning of the context."""
        return len(self.context) + len(self.continuation) > max_length + 1


@dataclass(frozen=True, slots=True)
class Score:
    """log_likelihood: nats, summed over the continuation; is_greedy: each of its tokens is the most likely one."""

    log_likelihood: float
    is_greedy: bool


def score_requests(
    model: LanguageModel,
    requests: Sequence[Request],
    max_length: int,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score ``requests``, answers in their order; the batching changes nothing but the last bits of a float.

    Args:
        model: the network.
        requests: token ids.
        max_length: tokens that fit the model; a longer request loses the beginning of its context.
        max_batch_tokens: tokens of one forward pass; a single longer request still runs alone.
        on_progress: called with (requests done, all requests).

    Raises:
        EvaluationError: a context or continuation is empty, a continuation alone does not fit ``max_length``, or the
            model's logits are not finite.
    """
    members = _by_input(requests, max_length)
    scores: dict[int, Score] = {}
    for inputs in _batches(sorted(members, key=lambda tokens: (-len(tokens), tokens)), max_batch_tokens):
        scores.update(_score_batch(model, inputs, [members[tokens] for tokens in inputs], requests))
        if on_progress is not None:
            on_progress(len(scores), len(requests))
    return [scores[index] for index in range(len(requests))]


def _by_input(requests: Sequence[Request], max_length: int) -> dict[tuple[int, ...], list[int]]:
    """Fed token ids -> the requests that feed them."""
    members: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise EvaluationError(f"request {index} has no context or no continuation: both need at least one token")
        if len(request.continuation) > max_length:
            raise EvaluationError(
                f"request {index} scores {len(request.continuation)} tokens, more than the {max_length} that fit the "
                "model: shorten the row or leave it out"
            )
        members.setdefault(request.inputs(max_length), []).append(index)
    return members


def _batches(inputs: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    batch: list[tuple[int, ...]] = []
    num_tokens = 0
    for tokens in inputs:
        if batch and num_tokens + len(tokens) > max_batch_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(tokens)
        num_tokens += len(tokens)
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(
    model: LanguageModel, inputs: Sequence[tuple[int, ...]], members: Sequence[list[int]], requests: Sequence[Request]
) -> dict[int, Score]:
    """Request index -> score, for the requests ``members[i]`` that feed ``inputs[i]``."""
    hidden = model(Batch.uncached(inputs, model.device))
    rows: list[int] = []
    targets: list[int] = []
    indices: list[int] = []
    end = 0
    for tokens, sharing in zip(inputs, members, strict=True):
        end += len(tokens)
        for index in sharing:
            continuation = requests[index].continuation
            rows += range(end - len(continuation), end)
            targets += continuation
            indices.append(index)
    log_likelihoods, is_greedy = _score_rows(model, hidden, rows, targets)
    lengths = [len(requests[index].continuation) for index in indices]
    pieces = zip(indices, torch.split(log_likelihoods, lengths), torch.split(is_greedy, lengths), strict=True)
    return {index: _score(values, greedy) for index, values, greedy in pieces}


def _score_rows(
    model: LanguageModel, hidden: Tensor, rows: Sequence[int], targets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """For each of ``rows``: log-likelihood of its target, float64, and whether the target is the most likely token."""
    log_likelihoods, is_greedy = [], []
    for start in range(0, len(rows), LOGIT_ROWS):
        picked = torch.tensor(rows[start : start + LOGIT_ROWS], device=hidden.device)
        target = torch.tensor(targets[start : start + LOGIT_ROWS], device=hidden.device)
        logits = model.logits(hidden[picked])
        log_likelihoods.append(-F.cross_entropy(logits, target, reduction="none").double().cpu())
        is_greedy.append((logits.argmax(-1) == target).cpu())
    return torch.cat(log_likelihoods), torch.cat(is_greedy)


def _score(log_likelihoods: Tensor, is_greedy: Tensor) -> Score:
    total = log_likelihoods.sum().item()
    if not math.isfinite(total):
        raise EvaluationError(
            "the model's logits are not finite: evaluate in float32 (--dtype float32), or rebuild the artifact"
        )
    return Score(total, bool(is_greedy.all()))
