"""``qerve compare`` on a tiny checkpoint: what is measured, what is taken over, what fails, what is written."""

import csv
import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from models import cli_compare
from models.build import build_artifact
from models.compare.config import CompareConfig
from models.compare.observer import SilentCompareObserver
from models.compare.run import compare
from models.errors import QerveError, SchemeError
from models.evaluate.load import load_for_evaluation
from models.evaluate.perplexity import perplexity
from models.llama.checkpoint import open_checkpoint
from tests.support.builds import digests
from tests.support.tiny_checkpoints import CORPUS, tiny_config, write_checkpoint

WINDOW = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a text to calibrate on, one to evaluate on, and a task."""
    root = tmp_path_factory.mktemp("compare")
    write_checkpoint(root / "tiny", tiny_config(hidden_size=64, intermediate_size=96))
    (root / "train.txt").write_text("\n".join(CORPUS) * 6, encoding="utf-8")
    (root / "test.txt").write_text("\n".join(reversed(CORPUS)) * 2, encoding="utf-8")
    rows = [{"context": "The river", "choices": [" runs", " 42"], "label": index % 2} for index in range(6)]
    (root / "rivers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def values(files, **changes):
    calibration = {
        "source": str(files / "train.txt"),
        "num_sequences": 4,
        "sequence_length": WINDOW,
        "num_holdout": 1,
        "inputs": "dense",
    }
    return {
        "checkpoint": str(files / "tiny"),
        "base": {"scheme": {"num_bits": 3, "group_size": 32}, "calibration": calibration},
        "evaluation": {
            "texts": [{"path": str(files / "test.txt"), "window": WINDOW, "max_windows": 3}],
            "tasks": [{"task": str(files / "rivers.jsonl")}],
            "dtype": "float32",
        },
        "recipes": [
            {"name": "rtn", "reconstruct": {"method": "none", "rank": 0}},
            {"name": "lqer", "reconstruct": {"method": "lqer", "rank": 4}},
            {"name": "qera", "reconstruct": {"method": "qera-exact", "rank": 4}},
        ],
    } | changes


def config(files, **changes):
    return CompareConfig.from_dict(values(files, **changes))


class Watcher(SilentCompareObserver):
    """Remembers which rows were measured and which were taken over; stops everything at ``stop_at``."""

    def __init__(self, stop_at=None):
        self.started, self.measured, self.reused, self.stop_at = [], [], [], stop_at

    def row_started(self, name, number, total):
        self.started.append((name, number, total))

    def phase(self, name, total):
        if self.stop_at == (self.started[-1][0], name):
            raise KeyboardInterrupt

    def row_finished(self, result, *, is_reused):
        (self.reused if is_reused else self.measured).append(result.name)


def run(files, out, stop_at=None, **changes):
    watcher = Watcher(stop_at)
    return compare(config(files, **changes), out, observer=watcher), watcher


def scores(comparison):
    return {row.name: (row.texts, row.tasks, row.effective_bits, row.layers, row.spectra) for row in comparison.results}


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    comparison, watcher = run(files, out)
    assert watcher.measured == ["dense", "rtn", "lqer", "qera"]
    assert watcher.started == [(name, number, 4) for number, name in enumerate(watcher.measured, start=1)]
    return out, comparison


def cli():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("compare")(cli_compare.compare)
    return app


def invoke(*arguments, is_error=False):
    result = CliRunner().invoke(cli(), [str(argument) for argument in arguments])
    if is_error:
        assert isinstance(result.exception, QerveError), result.output
    elif result.exception is not None:
        raise result.exception
    return result


def test_a_second_run_measures_nothing(first, files):
    out, comparison = first
    again, watcher = run(files, out)
    assert watcher.measured == []
    assert watcher.reused == ["dense", "rtn", "lqer", "qera"]
    assert again.results == comparison.results


def test_rows_hold_what_qerve_eval_and_the_manifest_say(first, files, tmp_path):
    _, comparison = first
    rows = {row.name: row for row in comparison.results}
    recipe = config(files).expanded()[2]
    report = build_artifact(open_checkpoint(str(files / "tiny")), tmp_path / "a", recipe.build)
    for name, target in (("dense", files / "tiny"), ("qera", tmp_path / "a")):
        loaded = load_for_evaluation(str(target), "cpu", "float32")
        ids = loaded.tokenizer.encode((files / "test.txt").read_text(encoding="utf-8"))
        expected = perplexity(loaded.model, ids, window=WINDOW, max_windows=3)
        assert rows[name].texts[0].nll == expected.nll
        assert rows[name].texts[0].num_tokens == 3 * (WINDOW - 1)
    manifest = json.loads((tmp_path / "a" / "quantization.json").read_text(encoding="utf-8"))
    assert rows["qera"].effective_bits == report.effective_bits
    assert {path: item.output_error for path, item in rows["qera"].layers.items()} == {
        path: item["relative_output_error"] for path, item in manifest["linears"].items()
    }
    assert rows["qera"].output_error < rows["lqer"].output_error < rows["rtn"].output_error
    assert [score.num_rows for score in rows["dense"].tasks] == [6]


def test_statistics_are_collected_once_and_change_no_byte(first, files, tmp_path):
    _, comparison = first
    assert comparison.recipes[0].statistics == "collected"
    assert {row.statistics for row in comparison.recipes[1:]} <= {"cached", "collected"}
    run(files, tmp_path / "kept", keep_artifacts=True)
    for recipe in config(files).expanded():
        build_artifact(open_checkpoint(str(files / "tiny")), tmp_path / recipe.name, recipe.build)
        assert digests(tmp_path / "kept" / "artifacts" / recipe.name) == digests(tmp_path / recipe.name)
    _, watcher = run(files, tmp_path / "kept", keep_artifacts=True)
    assert watcher.measured == []


def test_singular_values_of_the_middle_layer_are_kept(first):
    _, comparison = first
    for row in comparison.recipes:
        assert {path.split(".")[2] for path in row.spectra} == {"1"}
        assert len(row.spectra) == 7
        assert all(spectrum.weighted for spectrum in row.spectra.values())


def test_artifacts_go_unless_they_are_kept(first):
    out, _ = first
    assert not (out / "artifacts").exists()


@pytest.mark.parametrize("phase", ["quantizing layers", "perplexity of test.txt"])
def test_an_interrupted_run_goes_on_with_what_is_missing(first, files, tmp_path, phase):
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path, stop_at=("lqer", phase))
    comparison, watcher = run(files, tmp_path)
    assert watcher.reused == ["dense", "rtn"]
    assert watcher.measured == ["lqer", "qera"]
    assert scores(comparison) == scores(first[1])


def test_only_what_changed_is_measured_again(files, tmp_path):
    run(files, tmp_path)
    changed = values(files)["recipes"]
    changed[1] = {"name": "lqer", "reconstruct": {"method": "lqer", "rank": 2}}
    _, watcher = run(files, tmp_path, recipes=[*changed, {"name": "more", "scheme": {"num_bits": 5}}])
    assert watcher.measured == ["lqer", "more"]
    evaluation = values(files)["evaluation"]
    evaluation["texts"][0]["max_windows"] = 2
    _, watcher = run(files, tmp_path, evaluation=evaluation)
    assert watcher.measured == ["dense", "rtn", "lqer", "qera"]


def test_a_text_of_other_content_is_another_text(files, tmp_path):
    text = tmp_path / "own.txt"
    evaluation = {"texts": [{"path": str(text), "window": WINDOW, "max_windows": 2}]}
    recipes = values(files)["recipes"][:1]
    for content, measured in (("a b c " * 40, 2), ("a b c " * 40, 0), ("d e f " * 40, 2)):
        text.write_text(content, encoding="utf-8")
        _, watcher = run(files, tmp_path / "out", evaluation=evaluation, recipes=recipes)
        assert len(watcher.measured) == measured


def test_a_damaged_result_is_measured_again(files, tmp_path):
    recipes = values(files)["recipes"][:1]
    run(files, tmp_path, recipes=recipes)
    file = tmp_path / "results" / "rtn.json"
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    _, watcher = run(files, tmp_path, recipes=recipes)
    assert watcher.measured == ["rtn"]


def failing(files):
    """The second recipe wants more calibration text than there is, which shows only when it is read."""
    recipes = values(files)["recipes"]
    recipes[1] |= {"calibration": {"num_sequences": 10_000}}
    return values(files, recipes=recipes)


def test_a_failing_recipe_is_recorded_the_run_goes_on_and_ends_with_an_error(files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(failing(files)), encoding="utf-8")
    result = invoke(tmp_path / "c.json", "--out", tmp_path / "out", is_error=True)
    assert re.search(r"1 of 4 rows failed.*\n  lqer: .*tokens", str(result.exception))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert "need" in rows["lqer"]["error"]
    assert rows["qera"]["error"] is None
    assert "failed" in result.stdout
    assert "lqer" not in json.loads((tmp_path / "out" / "results.json").read_text())["pareto_front"]["test.txt"]
    assert (tmp_path / "out" / "results" / "lqer.json").is_file()
    _, watcher = run(files, tmp_path / "out", recipes=values(files)["recipes"])
    assert watcher.measured == ["lqer"]


def test_a_defect_in_one_row_costs_no_other(files, tmp_path, monkeypatch):
    def broken(_checkpoint, out, *_args, **options):
        if out.name == "lqer":
            raise RuntimeError("out of memory")
        return build_artifact(_checkpoint, out, *_args, **options)

    monkeypatch.setattr("models.compare.run.build_artifact", broken)
    comparison, watcher = run(files, tmp_path)
    assert watcher.measured == ["dense", "rtn", "lqer", "qera"]
    (row,) = [row for row in comparison.results if row.error]
    assert row.error.startswith("RuntimeError: out of memory (test_compare.py:")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"scheme": {"group_size": 256}}, "recipe bad: .*group_size 256"),
        ({"reconstruct": {"rank": 1000}}, "recipe bad: .*rank 1000"),
        ({"reconstruct": {"method": "magic"}}, "recipe bad: .*magic"),
        ({"calibration": {"source": "absent.txt"}}, "recipe bad: .*absent.txt"),
        ({"calibration": {"sequence_length": 4096}}, "recipe bad: .*4096"),
    ],
)
def test_an_impossible_recipe_stops_everything_before_it_begins(files, tmp_path, recipe, message):
    recipes = [*values(files)["recipes"], {"name": "bad", **recipe}]
    with pytest.raises(QerveError, match=message):
        run(files, tmp_path / "out", recipes=recipes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["texts", "tasks"])
def test_missing_texts_and_tasks_stop_everything_before_it_begins(files, tmp_path, part):
    evaluation = values(files)["evaluation"]
    evaluation[part] = [{"texts": {"path": "absent.txt"}, "tasks": {"task": "absent.jsonl"}}[part]]
    with pytest.raises(QerveError, match="absent"):
        run(files, tmp_path / "out", evaluation=evaluation)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_table_csv_json_and_page(first, files, tmp_path):
    pytest.importorskip("plotly", reason="the page needs the extra report")
    out, comparison = first
    external = [{"name": "Q4_0", "effective_bits": 4.5, "perplexity": 300.0, "command": "llama-perplexity"}]
    (tmp_path / "c.json").write_text(json.dumps(values(files, external=external, output=str(out))), encoding="utf-8")
    result = invoke(tmp_path / "c.json")
    for expected in ("dense", "qera *", "perplexity, test.txt", "rivers acc", "measured with llama-perplexity"):
        assert expected in result.stdout
    rows = list(csv.DictReader((out / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows] == ["dense", "rtn", "lqer", "qera", "Q4_0"]
    for row, measured in zip(rows, comparison.results, strict=False):
        assert float(row["perplexity test.txt"]) == measured.perplexity("test.txt")
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert written["header"]["checkpoint sha256"] == open_checkpoint(str(files / "tiny")).fingerprint
    assert written["results"][3]["config"]["reconstruct"]["method"] == "qera-exact"
    assert written["external"][0]["mark"] == "measured with llama-perplexity"
    page = (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1))
    assert data["qera"]["perplexity test.txt"] == comparison.results[3].perplexity("test.txt")
    assert open_checkpoint(str(files / "tiny")).fingerprint in page


def test_without_plotly_everything_but_the_page_is_written(first, files, monkeypatch, tmp_path):
    out, _ = first
    (out / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr("models.report.page.find_spec", lambda _name: None)
    (tmp_path / "c.json").write_text(json.dumps(values(files)), encoding="utf-8")
    result = invoke(tmp_path / "c.json", "--out", out)
    assert "pip install 'qerve[report]'" in result.stderr
    assert (out / "results.csv").is_file()
    assert not (out / "report.html").exists()


def test_one_json_object_on_request(first, files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(values(files)), encoding="utf-8")
    printed = json.loads(invoke(tmp_path / "c.json", "--out", first[0], "--json").stdout)
    assert [row["name"] for row in printed["results"]] == ["dense", "rtn", "lqer", "qera"]


def test_a_dry_run_lists_the_recipes_and_measures_nothing(files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(values(files)), encoding="utf-8")
    output = invoke(tmp_path / "c.json", "--out", tmp_path / "out", "--dry-run").stdout
    assert "3 recipes" in output
    assert "INT3 g32, rtn, qera-exact r4" in output
    assert not (tmp_path / "out").exists()
    bad = values(files, recipes=[{"name": "bad", "reconstruct": {"rank": 1000}}])
    (tmp_path / "c.json").write_text(json.dumps(bad), encoding="utf-8")
    assert isinstance(invoke(tmp_path / "c.json", "--dry-run", is_error=True).exception, SchemeError)


def test_results_need_a_place(files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(values(files)), encoding="utf-8")
    assert "--out" in str(invoke(tmp_path / "c.json", is_error=True).exception)
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["c.json"]
