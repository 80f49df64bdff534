"""Tasks by name: datasets of the Hugging Face Hub under the prompts of lm-evaluation-harness, zero-shot.

| name | split | context | continuations |
|---|---|---|---|
| piqa | validation | ``Question: {goal}\\nAnswer:`` | both solutions |
| arc_easy, arc_challenge | test | ``Question: {question}\\nAnswer:`` | the answers |
| hellaswag | validation | ``{activity}: {ctx_a} {Ctx_b}``, WikiHow's brackets removed | the endings |
| winogrande | validation | the sentence up to the blank, filled with an option | the rest of the sentence |
| boolq | validation | ``{passage}\\nQuestion: {question}?\\nAnswer:`` | no, yes |
| openbookqa | test | the question's stem | the answers |
| lambada_openai | test | all words but the last | the last word |
"""

import re
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .hub import HubSource, LoadDataset, load_rows
from .task_files import FORMS, make_task, parse_row, read_task
from .tasks import Task

Row = Mapping[str, Any]


def load_task(name: str, max_rows: int | None = None, load_dataset: LoadDataset | None = None) -> Task:
    """The task in the file ``name``, or else the one of that name in ``HUB_TASKS``.

    Args:
        name: path of a .jsonl file, or a name.
        max_rows: keep the first rows.
        load_dataset: in place of ``datasets.load_dataset``.

    Raises:
        EvaluationError: neither file nor name, a row is damaged, or the Hub cannot be reached.
    """
    path = Path(name)
    if path.exists() or (path.suffix and name not in HUB_TASKS):
        return read_task(path, max_rows)
    if name not in HUB_TASKS:
        raise EvaluationError(
            f"{name}: neither a file nor a task; give a .jsonl file of rows {FORMS}, or one of {', '.join(HUB_TASKS)}"
        )
    source, convert = HUB_TASKS[name]
    alternative = f"give a local .jsonl file of rows {FORMS} in place of {name}"
    rows = islice(load_rows(source, f"task {name}", alternative, load_dataset), max_rows)
    parsed = [_parse(convert, values, f"{source.path}, row {number}") for number, values in enumerate(rows)]
    return make_task(name, parsed, source.path)


def _parse(convert: Callable[[Row], dict[str, Any]], values: Row, where: str) -> Any:
    try:
        return parse_row(convert(values), where)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{where}: not laid out as this task expects ({type(error).__name__}: {error}); the dataset has changed: "
            f"give a local .jsonl file of rows {FORMS}"
        ) from error


def _piqa(row: Row) -> dict[str, Any]:
    choices = [f" {row['sol1']}", f" {row['sol2']}"]
    return {"context": f"Question: {row['goal']}\nAnswer:", "choices": choices, "label": row["label"]}


def _arc(row: Row) -> dict[str, Any]:
    label = row["choices"]["label"].index(row["answerKey"])
    choices = [f" {text}" for text in row["choices"]["text"]]
    return {"context": f"Question: {row['question']}\nAnswer:", "choices": choices, "label": label}


def _openbookqa(row: Row) -> dict[str, Any]:
    label = row["choices"]["label"].index(row["answerKey"].lstrip())
    return {"context": row["question_stem"], "choices": [f" {text}" for text in row["choices"]["text"]], "label": label}


def _hellaswag(row: Row) -> dict[str, Any]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [f" {_without_brackets(ending)}" for ending in row["endings"]]
    return {"context": _without_brackets(context), "choices": choices, "label": int(row["label"])}


def _without_brackets(text: str) -> str:
    """WikiHow's section titles and other marks in brackets, as the harness strips them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(row: Row) -> dict[str, Any]:
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return {"contexts": contexts, "target": f" {after.strip()}", "label": ("1", "2").index(row["answer"])}


def _boolq(row: Row) -> dict[str, Any]:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"context": context, "choices": [" no", " yes"], "label": row["label"]}


def _lambada(row: Row) -> dict[str, Any]:
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "target": f" {word}"}


HUB_TASKS: dict[str, tuple[HubSource, Callable[[Row], dict[str, Any]]]] = {
    "piqa": (HubSource("baber/piqa", None, "validation"), _piqa),
    "arc_easy": (HubSource("allenai/ai2_arc", "ARC-Easy", "test"), _arc),
    "arc_challenge": (HubSource("allenai/ai2_arc", "ARC-Challenge", "test"), _arc),
    "hellaswag": (HubSource("Rowan/hellaswag", None, "validation"), _hellaswag),
    "winogrande": (HubSource("allenai/winogrande", "winogrande_xl", "validation"), _winogrande),
    "boolq": (HubSource("aps/super_glue", "boolq", "validation"), _boolq),
    "openbookqa": (HubSource("allenai/openbookqa", "main", "test"), _openbookqa),
    "lambada_openai": (HubSource("EleutherAI/lambada_openai", "default", "test"), _lambada),
}
"""Name -> dataset, and how a row of it becomes a row of ``task_files``."""
