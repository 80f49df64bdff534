"""Multiple-choice accuracy and LAMBADA, scored as lm-evaluation-harness does.

A row's score for a choice is the log-likelihood of the choice after its context. ``acc``: the best score is the right
choice's. ``acc_norm``: the same after dividing each score by the characters of its choice, which takes away the
advantage of short answers. LAMBADA asks for one word: ``acc`` is whether greedy decoding writes exactly that word, and
``perplexity`` is taken per word. Standard errors are those of a sample mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EvaluationError
from .encoding import TextTokenizer, encode_pair
from .scoring import MAX_BATCH_TOKENS, ContextModel, Request, Score, context_length, score_requests


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question.

    contexts, continuations: one pair per choice; LAMBADA has a single pair. Each continuation brings its delimiter
    label:                   index of the right choice; None: LAMBADA
    where:                   names the row in messages
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int | None
    where: str

    @property
    def has_choice_lengths(self) -> bool:
        """Whether the choices are what is scored; where they fill the contexts (WinoGrande) there is no acc_norm."""
        return self.label is not None and len(set(self.contexts)) == 1

    @property
    def choice_lengths(self) -> list[int]:
        """Characters of each choice without its delimiter space."""
        return [len(choice.removeprefix(" ")) for choice in self.continuations]


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of one kind under one name."""

    name: str
    rows: tuple[TaskRow, ...]

    @property
    def is_multiple_choice(self) -> bool:
        """Whether rows have choices; LAMBADA's have one target instead."""
        return self.rows[0].label is not None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Accuracy of one model on one task.

    acc, acc_norm:            fraction of rows
    acc_stderr and the like:  standard error of that mean; not a number with a single row
    perplexity:               LAMBADA: ``exp`` of the mean negative log-likelihood of a target word
    num_truncated:            rows whose context lost its beginning because it did not fit the model
    """

    task: str
    num_rows: int
    acc: float
    acc_stderr: float
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    perplexity: float | None = None
    num_truncated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)


def score_task(
    model: ContextModel,
    tokenizer: TextTokenizer,
    task: Task,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    max_length: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score ``task``.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        task: as ``read_task`` or ``load_task`` gives it.
        max_batch_tokens: tokens of one forward pass.
        max_length: tokens a row may have; longer contexts lose their beginning. None: the model's context length.
        on_progress: called with (choices done, all choices).

    Raises:
        EvaluationError: ``max_length`` exceeds the model's context, a row cannot be encoded or does not fit, or the
            model's logits are not finite.
    """
    length = context_length(model, max_length)
    requests = [_encode_row(tokenizer, row, length) for row in task.rows]
    flat = [request for row in requests for request in row]
    scores = score_requests(model, flat, length, max_batch_tokens=max_batch_tokens, on_progress=on_progress)
    answers = iter(scores)
    by_row = [[next(answers) for _ in row] for row in requests]
    num_truncated = sum(any(request.is_truncated(length) for request in row) for row in requests)
    return _summarize(task, by_row, num_truncated)


def mean_stderr(values: Sequence[float]) -> float:
    """Standard error of the mean, ``sqrt(sum (x - mean)^2 / (n - 1) / n)``; not a number for fewer than two values."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _encode_row(tokenizer: TextTokenizer, row: TaskRow, max_length: int) -> list[Request]:
    try:
        pairs = zip(row.contexts, row.continuations, strict=True)
        requests = [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]
    except EvaluationError as error:
        raise EvaluationError(f"{row.where}: {error}") from error
    longest = max(len(request.continuation) for request in requests)
    if longest > max_length:
        raise EvaluationError(
            f"{row.where}: a choice of {longest} tokens does not fit the {max_length} of the model: leave out the row"
        )
    return requests


def _summarize(task: Task, scores: Sequence[Sequence[Score]], num_truncated: int) -> TaskResult:
    pairs = list(zip(task.rows, scores, strict=True))
    if not task.is_multiple_choice:
        is_right = [float(row[0].is_greedy) for row in scores]
        nll = -math.fsum(row[0].log_likelihood for row in scores) / len(scores)
        acc, stderr = _mean(is_right), mean_stderr(is_right)
        return TaskResult(task.name, len(scores), acc, stderr, perplexity=_exp(nll), num_truncated=num_truncated)
    is_right = [float(_best([score.log_likelihood for score in row]) == question.label) for question, row in pairs]
    result = TaskResult(task.name, len(scores), _mean(is_right), mean_stderr(is_right), num_truncated=num_truncated)
    if not all(row.has_choice_lengths for row in task.rows):
        return result
    is_right = [float(_best(_normalized(question, row)) == question.label) for question, row in pairs]
    normalized = (_mean(is_right), mean_stderr(is_right), None, num_truncated)
    return TaskResult(result.task, result.num_rows, result.acc, result.acc_stderr, *normalized)


def _normalized(row: TaskRow, scores: Sequence[Score]) -> list[float]:
    return [score.log_likelihood / length for score, length in zip(scores, row.choice_lengths, strict=True)]


def _best(values: Sequence[float]) -> int:
    """Index of the largest; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
