"""The page of a comparison: complete in itself, its numbers those of the comparison, nothing in it taken for markup."""

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from models.errors import QerveError
from models.report.figures import figures, perplexity_figure
from models.report.labels import recipe_label
from models.report.layer_figures import rank_figure, spectrum_figure
from models.report.page import comparison_page, embedded
from models.report.result import TextScore
from models.report.table import to_csv
from tests.support.comparisons import build, comparison, dense, example, failed, recipe

pytest.importorskip("plotly", reason="the page needs the extra report")


class Page(HTMLParser):
    """Elements, script contents and table cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.rows = [], [], []
        self._in_script = self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "tr":
            self.rows.append([dict(attrs), []])
        if tag in {"td", "th"}:
            self.rows[-1][1].append("")
        self._in_script, self._in_cell = tag == "script", tag in {"td", "th"} or (self._in_cell and tag == "button")

    def handle_endtag(self, tag):
        self._in_script = False
        self._in_cell = self._in_cell and tag not in {"td", "th"}

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1][1] += data
        elif self._in_cell:
            self.rows[-1][1][-1] += data

    def json(self, **attributes):
        (text,) = [text for found, text in self.scripts if attributes.items() <= found.items()]
        return json.loads(text)


@pytest.fixture(scope="module")
def text():
    return comparison_page(example())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def figure_of(page, name):
    return page.json(**{"data-for": name})


def test_the_page_loads_nothing_from_anywhere(page):
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not attributes.get("href", "#").startswith(("http", "//"))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_styles_and_scripts_of_our_own_name_no_address(page):
    ours = [content for attributes, content in page.scripts if len(content) < 1_000_000]
    assert len(ours) == len(page.scripts) - 1  # the other one is plotly.js
    assert not any(re.search(r"https?:|//[a-z]+\.", content) for content in ours)


def test_equal_comparisons_give_equal_pages(text):
    assert comparison_page(example()) == text


def test_the_embedded_data_are_the_measured_numbers(page):
    data = page.json(id="data")
    assert list(data) == [row.name for row in example().results]
    assert data["qera-w4-r8"]["effective_bits"] == 4.5
    assert data["qera-w4-r8"]["perplexity wiki"] == pytest.approx(25.0)
    assert data["qera-w4-r8"]["times_dense wiki"] == pytest.approx(1.25)
    assert data["dense"]["acc piqa"] == 0.7
    assert data["broken"]["perplexity wiki"] is None


def test_the_table_has_every_row_dense_first_and_marks_the_front(page):
    rows = [(attributes, cells) for attributes, cells in page.rows if attributes.get("class") is not None]
    assert [cells[0] for _, cells in rows] == [row.name for row in example().results]
    assert rows[0][0]["class"] == "dense"
    assert [cells[0] for a, cells in rows if a["class"] == "front"] == ["rtn-w3", "rtn-w4", "qera-w4-r8", "qera-w4-r32"]
    assert rows[-1][1] == ["broken", "layer 3: not finite <b>"]


def test_perplexity_figure_has_every_recipe_the_front_the_dense_line_and_what_is_from_elsewhere(page):
    figure = figure_of(page, "perplexity-0")
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert set(traces) == {"rtn", "rtn + qera-exact", "rtn + lqer", "Pareto front", "not measured here"}
    assert traces["rtn + qera-exact"]["x"] == [4.5, 5.0]
    assert traces["rtn + qera-exact"]["customdata"][0] == ["qera-w4-r8", recipe_label(build(rank=8))]
    assert traces["Pareto front"]["x"] == [3.31, 4.31, 4.5, 5.0]
    assert traces["not measured here"]["customdata"] == [["Q4_0", "measured with llama-perplexity -m x"]]
    assert figure["layout"]["shapes"][0]["y0"] == pytest.approx(20.0)


def test_every_figure_is_in_the_page_under_its_own_id(page):
    names = [attributes["data-for"] for attributes, _ in page.scripts if "data-for" in attributes]
    assert names == ["perplexity-0", "accuracy", "layers", "depth", "rank", "spectrum", "cost"]
    assert {a.get("id") for _, a in page.elements} >= set(names)


def test_accuracies_come_with_standard_errors_dense_first(page):
    (trace,) = figure_of(page, "accuracy")["data"]
    assert trace["x"][0] == "dense"
    assert trace["y"][:2] == pytest.approx([70.0, 60.0])
    assert trace["error_y"]["array"][:2] == pytest.approx([6.5, 7.0])


def test_projections_are_in_the_order_in_which_the_network_runs_them(page):
    assert figure_of(page, "layers")["layout"]["xaxis"]["categoryarray"] == ["q_proj", "o_proj", "down_proj"]


def test_rank_figure_joins_recipes_that_differ_in_nothing_else():
    figure = rank_figure(example())
    assert [trace["x"] for trace in figure.traces] == [[8, 32]]
    assert figure.traces[0]["y"][0] > figure.traces[0]["y"][1]


def test_singular_values_become_the_error_that_each_rank_leaves():
    first = spectrum_figure(comparison(dense(), recipe("a", 4.5, 25.0))).traces
    assert [trace["name"] for trace in first] == ["a, weight", "a, outputs"]
    assert first[0]["y"] == pytest.approx([(5 / 14) ** 0.5, (1 / 14) ** 0.5, 0.0], abs=1e-6)
    assert first[1]["y"] == pytest.approx([(2 / 18) ** 0.5, (1 / 18) ** 0.5], abs=1e-6)


def test_a_comparison_without_tasks_layers_or_dense_row_still_has_its_main_figure():
    row = replace(recipe("a", 4.5, 25.0), tasks=(), layers={}, spectra={}, build_seconds=None)
    bare = comparison(failed("dense"), row)
    assert [figure.id for figure in figures(bare)] == ["perplexity-0"]
    assert "shapes" not in figures(bare)[0].layout
    assert comparison_page(bare)


def test_broken_networks_are_in_the_table_and_not_in_the_figure():
    infinite = replace(recipe("b", 2.3, None), texts=(TextScore("wiki", None, 100, 2),))
    page = Page(comparison_page(comparison(dense(), recipe("a", 4.5, 25.0), infinite)))
    assert page.json(id="data")["b"]["perplexity wiki"] is None
    assert perplexity_figure(comparison(dense(), infinite), 0, "wiki") is None
    assert "b" not in str(figure_of(page, "perplexity-0")["data"][0]["customdata"][0][0])


def test_names_and_texts_cannot_become_markup():
    nasty = "</script><script>alert(1)</script>"
    row = recipe("a", 4.5, 25.0, text=nasty)
    page = Page(comparison_page(comparison(dense(text=nasty), row, title=nasty)))
    assert len(page.scripts) == len(Page(comparison_page(comparison(dense(), recipe("a", 4.5, 25.0)))).scripts)
    assert f"perplexity {nasty}" in page.json(id="data")["a"]
    assert json.loads(embedded(json.dumps({"a": nasty}))) == {"a": nasty}


def test_csv_has_measured_failed_and_external_rows_told_apart():
    rows = list(csv.DictReader(io.StringIO(to_csv(example()))))
    assert [row["name"] for row in rows] == [row.name for row in example().results] + ["Q4_0"]
    assert {row["origin"] for row in rows[:-1]} == {"measured"}
    assert rows[-1]["origin"] == "measured with llama-perplexity -m x"
    assert float(rows[3]["perplexity wiki"]) == pytest.approx(25.0)
    assert (rows[-2]["error"], rows[-2]["effective_bits"]) == ("layer 3: not finite <b>", "")


def test_without_plotly_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr("models.report.page.find_spec", lambda _name: None)
    with pytest.raises(QerveError, match=r"qerve\[report\]"):
        comparison_page(example())


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_scripts_are_valid_javascript(page, tmp_path):
    for number, (attributes, content) in enumerate(page.scripts):
        if "type" not in attributes:
            file = tmp_path / f"{number}.js"
            file.write_text(content, encoding="utf-8")
            done = subprocess.run(["node", "--check", str(file)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_one_ruined_recipe_does_not_flatten_the_others_and_the_caption_says_so():
    good, ruined = recipe("good", 4.0, 25.0), recipe("ruined", 4.5, 900.0)
    figure = perplexity_figure(comparison(dense(), good, ruined), 0, "wiki")
    low, high = (10**exponent for exponent in figure.layout["yaxis"]["range"])
    assert low < dense().perplexity("wiki") < 25.0 < high < 900.0
    assert "1 of them lie above what is shown" in figure.caption
    assert "range" not in perplexity_figure(comparison(dense(), good), 0, "wiki").layout["yaxis"]
