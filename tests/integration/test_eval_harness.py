"""lm-evaluation-harness beside our own scores, on the harness's own task definitions over the same made-up rows.

Two comparisons: its evaluation of our registered model, and, as an outside oracle for the numbers themselves, its
evaluation of the same checkpoint through transformers.
"""

import math
import random
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.errors import EvaluationError
from models.evaluate.corpora import Corpus
from models.evaluate.hub_tasks import HUB_TASKS, load_task
from models.evaluate.load import load_for_evaluation
from models.evaluate.tasks import score_task
from models.evaluate.word_level import word_perplexity
from tests.support.tiny_checkpoints import CORPUS, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

REASON = "lm-evaluation-harness is not installed: pip install 'qerve[eval]'"
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)

TASK_FOLDERS = ("piqa", "arc", "hellaswag", "winogrande", "super_glue", "openbookqa", "lambada", "wikitext")
NUM_ROWS = 24
WORDS = " ".join(CORPUS).split()


def say(rng, low=1, high=6):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def rows_of(name):
    rng = random.Random(name)
    makers = {
        "piqa": lambda: {"goal": say(rng), "sol1": say(rng), "sol2": say(rng), "label": rng.randint(0, 1)},
        "arc": lambda: {
            "question": say(rng),
            "choices": {"text": [say(rng) for _ in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": rng.choice("ABCD"),
        },
        "hellaswag": lambda: {
            "activity_label": say(rng, 1, 2),
            "ctx_a": f"{say(rng)} [header] {say(rng)}.",
            "ctx_b": say(rng, 1, 2),
            "endings": [f"{say(rng)} [title] {say(rng)}", f"{say(rng)}  x [step] y", say(rng), say(rng)],
            "label": str(rng.randint(0, 3)),
        },
        "winogrande": lambda: {
            "sentence": f"{say(rng)} _ {say(rng)}.",
            "option1": say(rng, 1, 2),
            "option2": say(rng, 1, 2),
            "answer": rng.choice("12"),
        },
        # Long enough to be cut from the left at 128 tokens now and then.
        "boolq": lambda: {"passage": say(rng, 1, 40), "question": say(rng), "label": rng.randint(0, 1)},
        "openbookqa": lambda: {
            "question_stem": say(rng),
            "choices": {"text": [say(rng) for _ in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": rng.choice(["A", " B", "C", "D"]),
        },
        "lambada_openai": lambda: {"text": f"{say(rng, 2, 9)} {rng.choice(WORDS)}"},
        "wikitext": lambda: {"page": f" = {say(rng, 1, 2)} = \n {say(rng, 30, 90)} , \n {say(rng)} @-@ 's . \n"},
    }
    make = makers[name.removesuffix("_easy").removesuffix("_challenge")]
    return [make() for _ in range(NUM_ROWS)]


def load_dataset(path, name=None, split=None, **_):
    """In place of ``datasets.load_dataset``: made-up rows of the dataset that is asked for."""
    (task,) = [
        task
        for task, (source, _) in [*HUB_TASKS.items(), ("wikitext", (WIKITEXT, None))]
        if (source.path, source.config) == (path, name)
    ]
    rows = datasets.Dataset.from_list(rows_of(task))
    return rows if split else datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))


class WIKITEXT:
    path, config = "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_for_evaluation(str(checkpoint), "cpu", "float32")


@pytest.fixture(scope="module")
def ours(loaded):
    from models.evaluate.lm_eval_model import QerveLM

    return QerveLM(loaded=loaded, max_batch_tokens=300)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4, add_bos_token=None)


@pytest.fixture(scope="module")
def harness():
    """(model, task names) -> the harness's results and its samples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        manager = TaskManager(include_defaults=False, include_path=[str(folder / name) for name in TASK_FOLDERS])
        loaded_tasks = manager.load([*HUB_TASKS, "wikitext"])
    return lambda model: evaluate(model, loaded_tasks, bootstrap_iters=0)


@pytest.fixture(scope="module")
def from_our_model(harness, ours):
    return harness(ours)


@pytest.fixture(scope="module")
def from_transformers(harness, oracle):
    return harness(oracle)


def log_likelihoods(results, task):
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]


@pytest.mark.parametrize("source", ["from_our_model", "from_transformers"])
@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_tasks_numbers_equal_the_harness(request, loaded, source, name):
    measured = request.getfixturevalue(source)["results"][name]
    result = score_task(loaded.model, loaded.tokenizer, load_task(name, load_dataset=load_dataset))
    assert result.num_rows == NUM_ROWS
    assert result.acc == pytest.approx(measured["acc,none"], abs=1e-12)
    assert result.acc_stderr == pytest.approx(math.sqrt(result.acc * (1 - result.acc) / (NUM_ROWS - 1)), abs=1e-12)
    if "acc_norm,none" in measured:
        assert result.acc_norm == pytest.approx(measured["acc_norm,none"], abs=1e-12)
    if name == "lambada_openai":
        assert result.perplexity == pytest.approx(measured["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("name", HUB_TASKS)
def test_our_model_scores_every_choice_as_transformers_does(from_our_model, from_transformers, name):
    if name == "lambada_openai":
        pair = [
            [float(value) for sample in results["samples"][name] for value in sample["filtered_resps"][0][:1]]
            for results in (from_our_model, from_transformers)
        ]
    else:
        pair = [log_likelihoods(results, name) for results in (from_our_model, from_transformers)]
    assert pair[0] == pytest.approx(pair[1], abs=2e-3)
    assert len(set(pair[0])) > 1


@pytest.mark.parametrize("source", ["from_our_model", "from_transformers"])
def test_word_level_perplexity_equals_the_harness(request, loaded, source):
    measured = request.getfixturevalue(source)["results"]["wikitext"]
    documents = [
        document
        for row in rows_of("wikitext")
        for document in Corpus("wikitext", "wikitext2", (row["page"],)).documents()
    ]
    result = word_perplexity(loaded.model, loaded.tokenizer, documents)
    assert result.num_documents == NUM_ROWS
    assert result.word_perplexity == pytest.approx(measured["word_perplexity,none"], rel=1e-4)
    assert result.byte_perplexity == pytest.approx(measured["byte_perplexity,none"], rel=1e-5)
    assert result.bits_per_byte == pytest.approx(measured["bits_per_byte,none"], rel=1e-5)


def generation_requests(options):
    from lm_eval.api.instance import Instance

    prompts = ["The river runs", "def add(a, b):", " ".join(CORPUS)]
    return [Instance("generate_until", {}, (prompt, options), index) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("until", [[], ["e"], ["\n", " "]])
def test_generated_text_equals_transformers(ours, oracle, until):
    requests = generation_requests({"until": until, "max_gen_toks": 12, "do_sample": False})
    assert ours.generate_until(requests) == oracle.generate_until(requests)


def test_sampling_and_too_many_tokens_are_refused(ours):
    with pytest.raises(EvaluationError, match="greedily"):
        ours.generate_until(generation_requests({"do_sample": True, "temperature": 0.7}))
    with pytest.raises(EvaluationError, match="128"):
        ours.generate_until(generation_requests({"max_gen_toks": 128}))


def test_the_chat_template_is_the_tokenizers_own(ours, oracle):
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages) == oracle.apply_chat_template(messages)


def test_the_harness_command_line_finds_the_model_by_name(checkpoint, tmp_path, monkeypatch):
    import lm_eval.tasks
    import typer

    from models.cli_eval import lm_evaluation_harness

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sys.argv", ["qerve"])
    # Without the thousands of tasks that the harness would read from its own folder first.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    cli = typer.Typer()
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    cli.callback()(lambda: None)
    cli.command("lm-eval", context_settings=passed_on)(lm_evaluation_harness)
    folder = Path(lm_eval.__file__).parent / "tasks" / "piqa"
    arguments = f"lm-eval --model qerve --model_args path={checkpoint},dtype=float32 --tasks piqa --limit 5"
    result = CliRunner().invoke(cli, [*arguments.split(), "--include_path", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "acc_norm" in result.stdout


def test_without_a_path_the_model_says_what_to_give():
    from models.evaluate.lm_eval_model import QerveLM

    with pytest.raises(EvaluationError, match="--model_args path="):
        QerveLM()
