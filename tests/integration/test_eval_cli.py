"""``qerve eval`` as a user types it: several texts and tasks at once, JSON, tables, and mistakes found early."""

import json
import math

import pytest
import typer
from typer.testing import CliRunner

from models.cli_eval import evaluate
from models.errors import EvaluationError
from models.evaluate.load import load_for_evaluation
from models.evaluate.perplexity import perplexity
from models.evaluate.task_files import read_task
from models.evaluate.tasks import score_task
from tests.support.tiny_checkpoints import CORPUS, write_checkpoint

ROWS = [
    {"context": "The river runs", "choices": [" past the mill", " boats", " 40"], "label": number % 3}
    for number in range(6)
]
WIKI = " \n = Mill = \n \n The river , the mill @-@ house . \n = Boat = \n She counted . \n" * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "plain.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    (folder / "wiki.raw").write_text(WIKI, encoding="utf-8")
    (folder / "mill.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    lambada = [{"context": "The old", "target": " mill"}, {"context": "She counted", "target": " 123"}]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, lambada)), encoding="utf-8")
    (folder / "damaged.jsonl").write_text("{", encoding="utf-8")
    return folder


def run(*arguments):
    cli = typer.Typer(pretty_exceptions_enable=False)
    cli.command()(evaluate)
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def measure(*arguments):
    result = run(*arguments, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_texts_and_tasks_are_measured_in_one_run_as_their_functions_measure_them(checkpoint, files, tmp_path):
    values = measure(
        checkpoint, "--text", files / "plain.txt", "--text", files / "wiki.raw", "--task", files / "mill.jsonl",
        "--task", files / "words.jsonl", "--window", 32, "--out", tmp_path / "results.json",
    )  # fmt: skip
    loaded = load_for_evaluation(str(checkpoint), "cpu", "float32")
    for entry, name in zip(values["texts"], ("plain.txt", "wiki.raw"), strict=True):
        text = (files / name).read_text(encoding="utf-8")
        wanted = perplexity(loaded.model, loaded.tokenizer.encode(text), window=32)
        assert entry["text"].endswith(name)
        assert (entry["num_tokens"], entry["window"], entry["stride"]) == (wanted.num_tokens, 32, 32)
        assert entry["perplexity"] == pytest.approx(wanted.perplexity)
    for entry, name in zip(values["tasks"], ("mill.jsonl", "words.jsonl"), strict=True):
        wanted = score_task(loaded.model, loaded.tokenizer, read_task(files / name))
        assert entry == pytest.approx(wanted.to_dict())
    assert "perplexity" not in values
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == values


def test_one_text_alone_has_its_numbers_at_the_top_level_too(checkpoint, files):
    values = measure(checkpoint, "--text", files / "plain.txt", "--max-windows", 1)
    assert values["perplexity"] == values["texts"][0]["perplexity"]
    assert values["window"] == 128
    assert (values["dtype"], values["tasks"]) == ("float32", [])


def test_word_level_divides_the_likelihood_of_detokenized_articles_by_original_words(checkpoint, files):
    options = ("--convention", "wikitext2", "--word-level", "--window", 16)
    values = measure(checkpoint, "--text", files / "wiki.raw", *options)
    assert values["convention"] == "wikitext2"
    assert values["num_documents"] == 8
    assert values["bits_per_byte"] == pytest.approx(math.log2(values["byte_perplexity"]))
    nll_by_word = math.log(values["word_perplexity"]) * values["num_words"]
    assert nll_by_word == pytest.approx(math.log(values["byte_perplexity"]) * values["num_bytes"])
    first = measure(checkpoint, "--text", files / "wiki.raw", *options, "--max-rows", 1)
    assert first["num_documents"] == 1
    assert first["num_tokens"] == values["num_tokens"]


def test_a_number_that_json_cannot_hold_is_null(checkpoint, files):
    assert measure(checkpoint, "--task", files / "mill.jsonl", "--max-rows", 1)["tasks"][0]["acc_stderr"] is None


def test_batch_size_changes_no_score(checkpoint, files):
    small, large = (
        measure(checkpoint, "--task", files / "words.jsonl", "--max-batch-tokens", tokens) for tokens in (1, 999)
    )
    assert small["tasks"][0].pop("perplexity") == pytest.approx(large["tasks"][0].pop("perplexity"), rel=1e-5)
    assert small == large


def test_tables_for_people_label_token_and_word_level(checkpoint, files):
    output = run(
        checkpoint, "--text", files / "wiki.raw", "--word-level", "--task", files / "mill.jsonl", "--task",
        files / "words.jsonl", "--window", 32, "--stride", 16, "--max-length", 8,
    ).output  # fmt: skip
    for expected in ("token perplexity", "word perplexity", "bits per byte", "windows of 32, stride 16", "acc_norm"):
        assert expected in output
    assert "±" in output


def test_rows_that_were_cut_are_mentioned(checkpoint, files):
    output = run(checkpoint, "--task", files / "mill.jsonl", "--max-length", "8").output
    assert "mill: 6 rows lost the beginning" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure"),
        (("--word-level", "--task", "FILES/mill.jsonl"), "--word-level needs a text"),
        (("--text", "FILES/absent.txt"), "absent.txt: cannot be read"),
        (("--task", "FILES/absent.jsonl"), "absent.jsonl: cannot be read"),
        (("--task", "FILES/damaged.jsonl"), "damaged.jsonl:1: not JSON"),
        (("--dataset", "wikitext103"), "wikitext103: not a dataset"),
        (("--task", "piqqa"), "neither a file nor a task"),
        (("--text", "FILES/plain.txt", "--convention", "c4"), "plain.txt:1"),
        (("--text", "FILES/plain.txt", "--window", "8", "--stride", "9"), "stride 9 skips tokens"),
        (("--text", "FILES/plain.txt", "--device", "gpu"), "device 'gpu'"),
        (("--text", "FILES/plain.txt", "--out", "FILES/none/results.json"), "existing directory"),
        (("--text", "FILES/plain.txt", "--out", "FILES"), "existing directory"),
    ],
)
def test_a_mistake_is_found_before_the_model_is_loaded(files, arguments, message):
    given = [argument.replace("FILES", str(files)) for argument in arguments]
    result = run("no-such-model", *given)
    assert isinstance(result.exception, EvaluationError)
    assert message in str(result.exception)


def test_a_window_that_the_model_cannot_hold_is_refused(checkpoint, files):
    result = run(checkpoint, "--text", files / "plain.txt", "--window", "129")
    assert "window 129 is more than the model's context of 128" in str(result.exception)


def test_datasets_are_loaded_by_their_convention(checkpoint, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, split, **_):
        asked.append((path, config, split))
        return [{"text": f"{line} \n"} for line in CORPUS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    values = measure(checkpoint, "--dataset", "wikitext2", "--window", 16)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert (values["text"], values["convention"]) == ("wikitext2", "wikitext2")
    assert values["num_tokens"] % 15 == 0


def test_an_unknown_convention_is_a_usage_error(checkpoint, files):
    assert run(checkpoint, "--text", files / "plain.txt", "--convention", "wikitext103").exit_code == 2
