"""Measures one network: the texts and tasks of a comparison, by the functions behind ``qerve eval``."""

import time
from dataclasses import dataclass
from pathlib import Path

from ..artifact.execution import RunOptions
from ..build.observer import BuildObserver
from ..evaluate.corpora import Corpus, load_corpus, read_corpus
from ..evaluate.hub_tasks import load_task
from ..evaluate.load import Evaluated, load_for_evaluation
from ..evaluate.perplexity import perplexity
from ..evaluate.tasks import Task, score_task
from ..memory import return_freed_memory
from ..plain import finite
from ..report.result import TaskScore, TextScore
from .config import EvaluationConfig, TextConfig


@dataclass(frozen=True, slots=True)
class Scores:
    """What one network reached."""

    texts: tuple[TextScore, ...]
    tasks: tuple[TaskScore, ...]
    seconds: float


class Evaluation:
    """The texts and tasks of a comparison, read and checked once, before anything is built.

    Raises:
        EvaluationError: a text or a task cannot be read.
    """

    def __init__(self, config: EvaluationConfig, device: str) -> None:
        self._config = config
        self._device = device
        self._texts = [(text, _corpus(text)) for text in config.texts]
        self._tasks: list[Task] = [load_task(task.task, task.max_rows) for task in config.tasks]

    def measure(self, path_or_id: str, observer: BuildObserver) -> Scores:
        """Load the artifact or checkpoint ``path_or_id`` and score it on everything.

        Raises:
            QerveError: it cannot be loaded or scored.
        """
        started = time.perf_counter()
        observer.phase("loading", 1)
        loaded = load_for_evaluation(path_or_id, self._device, self._config.dtype, RunOptions(self._config.backend))
        texts = tuple(self._text(loaded, text, corpus, observer) for text, corpus in self._texts)
        tasks = tuple(_task(loaded, task, observer) for task in self._tasks)
        del loaded
        return_freed_memory()
        return Scores(texts, tasks, round(time.perf_counter() - started, 2))

    def _text(self, loaded: Evaluated, text: TextConfig, corpus: Corpus, observer: BuildObserver) -> TextScore:
        observer.phase(f"perplexity of {text.label}", text.max_windows or 1)
        token_ids = corpus.tokens(loaded.tokenizer.encode, text.window)
        result = perplexity(
            loaded.model,
            token_ids,
            window=text.window,
            max_windows=text.max_windows,
            on_window=lambda done, _total: observer.progress(done),
        )
        return TextScore(text.label, finite(result.nll), result.num_tokens, result.num_windows)


def _corpus(text: TextConfig) -> Corpus:
    return read_corpus(Path(text.path), text.convention) if text.path else load_corpus(text.convention)


def _task(loaded: Evaluated, task: Task, observer: BuildObserver) -> TaskScore:
    observer.phase(f"task {task.name}", sum(len(row.continuations) for row in task.rows))
    found = score_task(loaded.model, loaded.tokenizer, task, on_progress=lambda done, _total: observer.progress(done))
    return TaskScore(
        task=task.name,
        num_rows=found.num_rows,
        acc=finite(found.acc),
        acc_stderr=finite(found.acc_stderr),
        acc_norm=finite(found.acc_norm),
        acc_norm_stderr=finite(found.acc_norm_stderr),
        perplexity=finite(found.perplexity),
    )
