"""Tasks from local files: one JSON object a line, checked row by row before any model is loaded.

    {"context": "Question: ...\\nAnswer:", "choices": [" yes", " no"], "label": 0}    multiple choice
    {"contexts": ["... the box", "... the bag"], "target": " is full.", "label": 1}   the choices fill the context
    {"context": "... I don't care about", "target": " signs"}                         LAMBADA

Choices and targets bring their delimiter, which is a space in English. Other keys are ignored.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .tasks import Task, TaskRow

FORMS = '{"context", "choices", "label"}, {"contexts", "target", "label"} or {"context", "target"}'


def read_task(path: Path, max_rows: int | None = None) -> Task:
    """The task in the file ``path``, named after it; ``max_rows`` keeps the first rows.

    Raises:
        EvaluationError: the file cannot be read or is empty, or a line is not a row; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    # Rows past max_rows are checked too: a damaged file is damaged however much of it is asked for.
    rows = [
        parse_row(_parse_line(line, f"{path}:{number}"), f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return make_task(path.stem, rows, str(path), max_rows)


def make_task(name: str, rows: list[TaskRow], where: str, max_rows: int | None = None) -> Task:
    """A task of the first ``max_rows`` of ``rows``.

    Raises:
        EvaluationError: there are none, or rows with choices and rows of LAMBADA's kind are mixed.
    """
    if not rows:
        raise EvaluationError(f"{where}: there are no rows; each line is one JSON object {FORMS}")
    for row in rows:
        if (row.label is None) != (rows[0].label is None):
            raise EvaluationError(
                f"{row.where}: rows with a label and rows without one are mixed in a file: split it in two"
            )
    return Task(name, tuple(rows[:max_rows]))


def parse_row(values: dict[str, Any], where: str) -> TaskRow:
    """One row from the keys that ``FORMS`` lists.

    Raises:
        EvaluationError: keys are missing or of the wrong type; starts with ``where``.
    """
    if "choices" in values:
        choices = tuple(_texts(values, "choices", where))
        contexts = (_text(values, "context", where),) * len(choices)
        return TaskRow(contexts, choices, _label(values, len(choices), where), where)
    if "contexts" in values:
        contexts = tuple(_texts(values, "contexts", where))
        continuations = (_text(values, "target", where, is_needed=True),) * len(contexts)
        return TaskRow(contexts, continuations, _label(values, len(contexts), where), where)
    if "target" not in values or "context" not in values:
        raise EvaluationError(f"{where}: a row is {FORMS}; this one has the keys {', '.join(values) or 'none'}")
    if "label" in values:
        raise EvaluationError(f'{where}: a row with a label needs "choices" or "contexts"; LAMBADA rows have no label')
    return TaskRow(
        (_text(values, "context", where),), (_text(values, "target", where, is_needed=True),), None, where
    )  # fmt: skip


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{where}: not JSON ({error}); each line is one object {FORMS}") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{where}: a row is an object {FORMS}, not a {type(values).__name__}")
    return values


def _text(values: dict[str, Any], key: str, where: str, is_needed: bool = False) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise EvaluationError(f'{where}: "{key}" must be a text, not {value!r}')
    return _checked(value, key, where, is_needed)


def _texts(values: dict[str, Any], key: str, where: str) -> Iterator[str]:
    texts = values[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise EvaluationError(f'{where}: "{key}" must be a list of at least two texts, not {texts!r}')
    for text in texts:
        yield _checked(text, key, where, is_needed=True)


def _checked(text: str, key: str, where: str, is_needed: bool) -> str:
    if is_needed and not text.removeprefix(" "):
        raise EvaluationError(f'{where}: "{key}" holds an empty text: there is nothing to score; leave out the row')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise EvaluationError(f'{where}: "{key}" holds a lone surrogate, which is not a character: replace it')
    return text


def _label(values: dict[str, Any], num_choices: int, where: str) -> int:
    label = values.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_choices:
        raise EvaluationError(
            f'{where}: "label" is the index of the right choice, an integer 0 to {num_choices - 1}, not {label!r}'
        )
    return label
