"""Rounds: everything in turn, the first round apart, ratios within rounds, and what fails leaves the rest alone."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bench.probe import TOKENS_PER_SECOND, Probe, ProbeError, Samples, run_rounds

RATES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9)


def probe(metric, log, values):
    remaining = iter(values)

    def run():
        log.append(metric)
        return (next(remaining),)

    return Probe((metric,), TOKENS_PER_SECOND, run)


def samples_of(**values):
    samples = Samples()
    for metric, rounds in values.items():
        for value in rounds:
            samples.record(Probe((metric,), TOKENS_PER_SECOND, lambda: ()), (value,))
    return samples


def test_probes_take_turns_and_the_first_round_does_not_count():
    log = []
    samples = run_rounds([probe("a", log, [900, 1, 2]), probe("b", log, [900, 3, 4])], repeats=2)
    assert log == ["a", "b"] * 3
    assert samples.values == {"a": [1, 2], "b": [3, 4]}
    assert samples.units == {"a": TOKENS_PER_SECOND, "b": TOKENS_PER_SECOND}


def test_a_probe_that_fails_is_forgotten_and_the_others_go_on():
    def fails_in_the_third_round():
        log.append("bad")
        if log.count("bad") == 3:
            raise ProbeError("signal SIGSEGV")
        return (1.0,)

    log = []
    bad = Probe(("bad",), TOKENS_PER_SECOND, fails_in_the_third_round)
    samples = run_rounds([bad, probe("good", log, range(5))], repeats=4)
    assert samples.failed == {"bad": "signal SIGSEGV"}
    assert samples.values == {"good": [1, 2, 3, 4]}
    assert log.count("bad") == 3


def test_other_errors_are_not_hidden():
    def run():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_rounds([Probe(("a",), TOKENS_PER_SECOND, run)], repeats=1)


def test_progress_ends_where_it_said():
    told = []
    run_rounds([probe("a", [], range(3))], repeats=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@given(ours=RATES, factor=st.floats(0.01, 100))
def test_a_drifting_machine_does_not_change_the_ratio(ours, factor):
    samples = samples_of(ours=ours, theirs=[value / factor for value in ours])
    assert samples.ratio("ours", "theirs") == pytest.approx(factor)


@given(RATES)
def test_median_and_spread(values):
    samples = samples_of(a=values)
    middle = statistics.median(values)
    assert samples.median("a") == middle
    assert samples.spread("a") == pytest.approx((max(values) - min(values)) / middle)


def test_the_ratio_is_not_that_of_the_medians():
    assert samples_of(a=[1, 4, 9], b=[1, 8, 3]).ratio("a", "b") == 1


def test_what_was_not_measured_has_no_numbers():
    samples = samples_of(a=[1.0])
    assert samples.median("b") is samples.spread("b") is samples.ratio("a", "b") is samples.ratio("b", "a") is None


@pytest.mark.parametrize("values", [(1.0,), (1.0, float("nan"))])
def test_a_round_needs_a_finite_value_per_metric(values):
    with pytest.raises(ValueError, match=r"nan|shorter"):
        Samples().record(Probe(("a", "b"), TOKENS_PER_SECOND, lambda: ()), values)
