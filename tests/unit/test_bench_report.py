"""From samples to tables and JSON: only what was measured is shown, and shares are taken within rounds."""

import json

import pytest

from models.bench.llama import llama_metric
from models.bench.probe import BYTES_PER_SECOND, TOKENS_PER_SECOND, Probe, Samples
from models.bench.report import Limit, OperatorTime, Report, number, operator_cells, percent, speed_columns, times
from service.bench.output import print_report

DECODE, PREFILL = "decode 1", "prefill 512"


def report_of(rounds, **fields):
    samples = Samples()
    for metric, values in rounds.items():
        unit = BYTES_PER_SECOND if metric == "read bandwidth" else TOKENS_PER_SECOND
        for value in values:
            samples.record(Probe((metric,), unit, lambda: ()), (value,))
    return Report({"processor": "abacus"}, samples, [DECODE, PREFILL], **fields)


@pytest.fixture
def report():
    rounds = {
        "read bandwidth": [4e9, 4e9],
        DECODE: [90.0, 45.0],
        f"{DECODE}, kernels only": [120.0, 60.0],
        f"{DECODE}, rank 0": [180.0, 90.0],
        llama_metric(DECODE): [45.0, 22.5],
        "8 streams, engine": [200.0, 100.0],
        "8 streams, HTTP": [190.0, 95.0],
    }
    operators = [
        OperatorTime(DECODE, "qkv", 0.003, 3_000_000, 6_000_000, 0.25, 0.1),
        OperatorTime(DECODE, "attention", 0.001, 1_000_000, 1_000_000, 0.5, 0.1),
        OperatorTime(DECODE, "norm + round", 0.002),
    ]
    streams = ("8 streams, engine", "8 streams, HTTP")
    limits = {DECODE: Limit(0.01, 1)}
    return report_of(rounds, streams=streams, limits=limits, operators=operators, missing={"http": "no [socket]"})


def test_shares_and_ratios_are_taken_within_rounds(report):
    values = report.to_dict()
    assert values["shares"] == {DECODE: {"python": 0.25, "low_rank": 0.5, "of_limit": 0.675}}
    assert values["ratios"] == {
        f"{DECODE} / {DECODE}, llama.cpp": 2.0,
        f"{DECODE}, rank 0 / {DECODE}, llama.cpp": 4.0,
        "8 streams, HTTP / 8 streams, engine": 0.95,
    }
    assert values["metrics"][DECODE] == {
        "unit": TOKENS_PER_SECOND,
        "median": 67.5,
        "spread": pytest.approx(2 / 3),
        "values": [90.0, 45.0],
    }
    assert values["limits"] == {DECODE: 100.0}
    assert values["not_measured"] == {"http": "no [socket]"}
    assert json.loads(json.dumps(values)) == values


def test_the_table_has_the_columns_that_were_measured(report):
    columns = dict(speed_columns(report))
    assert columns["tokens/s"] == [DECODE]
    assert (columns["Python"], columns["low-rank"], columns["engine : llama.cpp"]) == (["25%"], ["50%"], ["2.00x"])
    plain = dict(speed_columns(report_of({DECODE: [1.0], PREFILL: [2.0]})))
    assert plain == {"tokens/s": [DECODE, PREFILL], "engine": ["1.0", "2.0"], "spread": ["0.0%", "0.0%"]}


def test_a_comparison_alone_is_shown_too():
    assert dict(speed_columns(report_of({llama_metric(PREFILL): [7.0]}))) == {
        "tokens/s": [PREFILL],
        "llama.cpp": ["7.0"],
    }


def test_operators_share_their_phase_without_what_is_part_of_others(report):
    cells = operator_cells(report.operators)
    assert cells[0] == [DECODE, "qkv", "3.000", "75%", "3.0", "1.0", "25%", "2", "10%"]
    assert cells[2] == [DECODE, "norm + round", "2.000", "50%", "-", "-", "-", "-", "-"]


def test_everything_is_printed(report, capsys):
    print_report(report)
    out = capsys.readouterr().out
    for text in ("abacus", "4.0 GB/s", "2.00x", "4.00x", "0.95x", "attention", "no [socket]"):
        assert text in out


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (3.14159, "3.1"), (999.94, "999.9"), (2860.4, "2860")])
def test_numbers(value, shown):
    assert number(value) == shown


def test_shares_and_ratios_as_text():
    assert [percent(value) for value in (None, 0.034, -0.05, 0.5, 1.2)] == ["-", "3.4%", "-5.0%", "50%", "120%"]
    assert [times(value) for value in (None, 2.0)] == ["-", "2.00x"]
