"""Tasks: accuracies by a loop over bytes, standard errors by formula, damaged rows, datasets that are not here."""

import json
import math
import statistics
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import EvaluationError
from models.evaluate.hub_tasks import HUB_TASKS, load_task
from models.evaluate.task_files import parse_row, read_task
from models.evaluate.tasks import Task, mean_stderr, score_task
from tests.support.byte_model import ByteModel, ByteTokenizer

GOOD = {"context": "Question: up?\nAnswer:", "choices": [" yes", " no"], "label": 0}
LAMBADA = {"context": "I don't care about", "target": " signs"}


def task_of(*rows):
    return Task("t", tuple(parse_row(row, f"row {number}") for number, row in enumerate(rows)))


def rows_of(count):
    generator = torch.Generator().manual_seed(1)

    def word():
        length = int(torch.randint(1, 9, (1,), generator=generator))
        return "".join(chr(97 + int(torch.randint(26, (1,), generator=generator))) for _ in range(length))

    return [
        {"context": f"Question: {word()}?", "choices": [f" {word()}" for _ in range(2 + n % 3)], "label": n % 2}
        for n in range(count)
    ]


def test_accuracies_equal_a_loop_over_rows_and_choices():
    model, rows = ByteModel(), rows_of(60)
    result = score_task(model, ByteTokenizer(), task_of(*rows))
    right, right_norm = [], []
    for row in rows:
        scores = [model.log_likelihood(row["context"], choice) for choice in row["choices"]]
        normalized = [score / len(choice[1:]) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["label"])
        right_norm.append(normalized.index(max(normalized)) == row["label"])
    assert right != right_norm
    assert (result.task, result.num_rows, result.perplexity, result.num_truncated) == ("t", 60, None, 0)
    assert result.acc == pytest.approx(sum(right) / 60)
    assert result.acc_norm == pytest.approx(sum(right_norm) / 60)
    assert result.acc_stderr == pytest.approx(math.sqrt(result.acc * (1 - result.acc) / 59))
    assert result.acc_norm_stderr == pytest.approx(math.sqrt(result.acc_norm * (1 - result.acc_norm) / 59))


def test_choices_in_the_context_are_scored_by_the_text_after_them():
    model = ByteModel()
    rows = [
        {"contexts": [f"the box {n} ", f"the bag {n}"], "target": f" is full of {n}.", "label": n % 2}
        for n in range(20)
    ]
    result = score_task(model, ByteTokenizer(), task_of(*rows))
    right = []
    for row in rows:
        texts = [context + row["target"] for context in row["contexts"]]
        kept = [context.rstrip() for context in row["contexts"]]
        scores = [model.log_likelihood(start, text[len(start) :]) for start, text in zip(kept, texts, strict=True)]
        right.append(scores.index(max(scores)) == row["label"])
    assert result.acc == pytest.approx(sum(right) / 20)
    assert (result.acc_norm, result.acc_norm_stderr) == (None, None)


def test_lambada_counts_words_that_greedy_decoding_writes_and_takes_perplexity_per_word():
    model = ByteModel()
    # Bytes under 128 stand for themselves: rows are kept where the model's own choice is text.
    contexts = [f"{chr(code)}" for code in range(33, 127)]
    rows = []
    for number, context in enumerate(contexts):
        best = model.most_likely(context, 1)
        if best[0] < 128 and not chr(best[0]).isspace():
            target = best.decode() if number % 2 else "zq"
            rows.append({"context": context, "target": target})
    greedy = [model.most_likely(row["context"], len(row["target"])) == row["target"].encode() for row in rows]
    nlls = [-model.log_likelihood(row["context"], row["target"]) for row in rows]
    result = score_task(model, ByteTokenizer(), task_of(*rows))
    assert 0 < sum(greedy) < len(rows)
    assert result.acc == pytest.approx(sum(greedy) / len(rows))
    assert result.perplexity == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    assert result.acc_norm is None


def test_equal_scores_go_to_the_first_choice():
    rows = [{"context": "a", "choices": [" b", " b"], "label": label} for label in (0, 1)]
    assert score_task(ByteModel(), ByteTokenizer(), task_of(*rows)).acc == 0.5


def test_rows_whose_context_was_cut_are_counted_and_scored_on_the_rest():
    row = {"context": "x" * 200, "choices": [" yes", " no"], "label": 0}
    cut = {**row, "context": "x" * 50}
    long, short = (score_task(ByteModel(), ByteTokenizer(), task_of(item, item)) for item in (row, cut))
    assert (long.num_truncated, short.num_truncated) == (2, 0)
    assert (long.acc, long.acc_norm) == (short.acc, short.acc_norm)


def test_a_choice_longer_than_the_model_is_named_by_its_row():
    with pytest.raises(EvaluationError, match=r"row 1: a choice of 71 tokens does not fit the 64"):
        score_task(ByteModel(), ByteTokenizer(), task_of(GOOD, {**GOOD, "choices": [" y", " " + "n" * 70]}))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_the_standard_error_is_that_of_a_sample_mean(values):
    assert mean_stderr(values) == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_row_has_no_standard_error():
    result = score_task(ByteModel(), ByteTokenizer(), task_of(GOOD))
    assert math.isnan(result.acc_stderr)
    assert result.to_dict()["num_rows"] == 1


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_file_becomes_a_task_named_after_it(tmp_path):
    extra = {**GOOD, "label": 1, "id": 7, "context": "é\u2028x"}
    task = read_task(write(tmp_path / "piqa_val.jsonl", GOOD, "", extra, ""))
    assert (task.name, len(task.rows), task.is_multiple_choice) == ("piqa_val", 2, True)
    assert task.rows[1].contexts == ("é\u2028x",) * 2
    assert task.rows[1].where.endswith("piqa_val.jsonl:3")
    assert len(read_task(tmp_path / "piqa_val.jsonl", max_rows=1).rows) == 1
    assert not read_task(write(tmp_path / "l.jsonl", LAMBADA)).is_multiple_choice


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a list"),
        ({}, "keys none"),
        ({"question": "?"}, "keys question"),
        ({**GOOD, "context": None}, '"context" must be a text'),
        ({**GOOD, "choices": " yes"}, "at least two texts"),
        ({**GOOD, "choices": [" yes"]}, "at least two texts"),
        ({**GOOD, "choices": [" yes", 3]}, "at least two texts"),
        ({**GOOD, "choices": [" yes", " "]}, "empty text"),
        ({**GOOD, "label": 2}, "integer 0 to 1, not 2"),
        ({**GOOD, "label": -1}, "integer 0 to 1"),
        ({**GOOD, "label": "0"}, "not '0'"),
        ({**GOOD, "label": True}, "not True"),
        ({"context": "a", "choices": [" b", " c"]}, "not None"),
        ({"contexts": ["a"], "target": "b", "label": 0}, "at least two texts"),
        ({"contexts": ["a", "b"], "label": 0}, '"target" must be a text'),
        ({**LAMBADA, "target": ""}, "empty text"),
        ({**LAMBADA, "label": 0}, "no label"),
        ('{"context": "\\ud800", "target": "a"}', "lone surrogate"),
    ],
)
def test_a_damaged_row_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "task.jsonl", LAMBADA if "target" in str(line) and "label" not in str(line) else GOOD, line)
    with pytest.raises(EvaluationError) as raised:
        read_task(path)
    assert f"{path}:2: " in str(raised.value)
    assert message in str(raised.value)


def test_damage_behind_the_rows_asked_for_is_found_too(tmp_path):
    with pytest.raises(EvaluationError, match=r"task\.jsonl:2"):
        read_task(write(tmp_path / "task.jsonl", GOOD, "{"), max_rows=1)


def test_mixed_kinds_empty_and_missing_files_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"m.jsonl:2: .*mixed"):
        read_task(write(tmp_path / "m.jsonl", GOOD, LAMBADA))
    with pytest.raises(EvaluationError, match="no rows"):
        read_task(write(tmp_path / "e.jsonl", ""))
    for name in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(EvaluationError, match="cannot be read"):
            load_task(str(name))
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe9"}')
    with pytest.raises(EvaluationError, match="UTF-8"):
        read_task(tmp_path / "latin.jsonl")


HUB_ROWS = {
    "piqa": {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 1},
    "arc_easy": {
        "question": "Which?",
        "choices": {"text": ["salt", "ice"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "hellaswag": {
        "activity_label": "Roof",
        "ctx_a": "A man [header] sits.",
        "ctx_b": "he",
        "endings": ["stands [title] up", "falls  off"],
        "label": "1",
    },
    "winogrande": {
        "sentence": "Ann fed _ because it cried.",
        "option1": "the cat",
        "option2": "the box",
        "answer": "1",
    },
    "boolq": {"passage": "Ice floats.", "question": "does ice float", "label": 1},
    "openbookqa": {
        "question_stem": "The sun is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": " A",
    },
    "lambada_openai": {"text": "I do not care about\nany signs"},
}
HUB_ROWS["arc_challenge"] = HUB_ROWS["arc_easy"]
WANTED = {
    "piqa": (("Question: open it\nAnswer:",) * 2, (" push", " pull"), 1),
    "arc_easy": (("Question: Which?\nAnswer:",) * 2, (" salt", " ice"), 1),
    "arc_challenge": (("Question: Which?\nAnswer:",) * 2, (" salt", " ice"), 1),
    "hellaswag": (("Roof: A man sits. He",) * 2, (" stands. up", " falls off"), 1),
    "winogrande": (("Ann fed the cat", "Ann fed the box"), (" because it cried.",) * 2, 0),
    "boolq": (("Ice floats.\nQuestion: does ice float?\nAnswer:",) * 2, (" no", " yes"), 1),
    "openbookqa": (("The sun is",) * 2, (" hot", " cold"), 0),
    "lambada_openai": (("I do not care about\nany",), (" signs",), None),
}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_dataset_row_becomes_the_harness_prompt(name):
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return [HUB_ROWS[name]] * 3

    task = load_task(name, max_rows=2, load_dataset=load)
    source = HUB_TASKS[name][0]
    assert asked == [(source.path, source.config, source.split)]
    assert len(task.rows) == 2
    assert (task.rows[0].contexts, task.rows[0].continuations, task.rows[0].label) == WANTED[name]


def test_a_dataset_that_changed_its_columns_is_an_error():
    with pytest.raises(EvaluationError, match=r"baber/piqa, row 0: not laid out.*KeyError"):
        load_task("piqa", load_dataset=lambda *_, **__: [{"prompt": "?"}])


def test_without_a_connection_the_local_alternative_is_named():
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    with pytest.raises(EvaluationError, match=r"reach the Hub\. Offline\? Give a local \.jsonl file") as raised:
        load_task("piqa", load_dataset=offline)
    assert "long trace" not in str(raised.value)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match=r"qerve\[data\]"):
        load_task("piqa")


def test_a_name_that_is_neither_file_nor_task_lists_the_tasks():
    with pytest.raises(EvaluationError, match=r"neither a file nor a task.*hellaswag"):
        load_task("mmlu")


def test_a_local_file_goes_before_a_dataset_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "piqa", GOOD)
    assert load_task("piqa").rows[0].continuations == (" yes", " no")
