"""The fault run's verdict: every alert is provoked or said not to be, and wrong ones are noticed."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.bench.fault_phases import NOT_INJECTED, PHASES, Phase, alerts
from tests.bench.fault_report import Window, intervals, judge, to_markdown
from tests.bench.faulty_server import Damage
from tests.support.fake_model import FakeParts

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules" / "qerve.yml"
FIRST = Phase("calm", 0.5)
SECOND = Phase("flood", 0.5, must=alerts("Rejecting"), may=alerts("SlowFirstToken"))
WINDOWS = [Window(FIRST, 1000, 1100), Window(SECOND, 1100, 1200)]


def test_every_alert_has_a_phase_in_which_it_must_fire_or_a_reason_why_not() -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    names = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    provoked = frozenset().union(*(phase.must for phase in PHASES))
    assert provoked | set(NOT_INJECTED) == names
    assert not provoked & set(NOT_INJECTED)
    assert frozenset().union(*(phase.may for phase in PHASES)) <= names


def test_phases_fill_the_run_and_begin_and_end_without_a_fault() -> None:
    assert sum(phase.share for phase in PHASES) == pytest.approx(1)
    assert not PHASES[0].must | PHASES[0].may | PHASES[-1].must
    assert (PHASES[0].damage, PHASES[0].restarts) == (None, 0)


def test_times_become_intervals() -> None:
    assert intervals([1, 2, 3, 7, 8, 12], 1) == [(1, 3), (7, 8), (12, 12)]
    assert intervals([], 1) == []


def test_right_alerts_are_accepted_even_shortly_after_their_phase() -> None:
    report = judge(WINDOWS, {"QerveRejecting": [(1150, 1180)], "QerveSlowFirstToken": [(1205, 1210)]}, hold=10)
    assert (report["missed"], report["unexpected"]) == ([], [])
    assert report["phases"][1]["fired"] == {"QerveRejecting": [150]}


@pytest.mark.parametrize(
    ("firing", "missed", "unexpected"),
    [
        ({}, 1, 0),
        ({"QerveRejecting": [(1050, 1060)]}, 1, 1),
        ({"QerveRejecting": [(1150, 1160)], "QerveTargetDown": [(1150, 1151)]}, 0, 1),
        ({"QerveRejecting": [(1150, 1160)], "QerveSlowFirstToken": [(1215, 1220)]}, 0, 1),
    ],
)
def test_wrong_alerts_are_noticed(firing: dict[str, list[tuple[float, float]]], missed: int, unexpected: int) -> None:
    report = judge(WINDOWS, firing, hold=10)
    assert (len(report["missed"]), len(report["unexpected"])) == (missed, unexpected)


def test_report_names_what_was_missed() -> None:
    report = {**judge(WINDOWS, {}, hold=10), "seconds": 200, "factor": 0.1, "alertmanager": "was told"}
    text = to_markdown({**report, "clients": {"flood: 429": 3}, "counters": {"qerve_x": 3}})
    assert "QerveRejecting during 'flood'" in text
    assert "| flood: 429 | 3 |" in text


def test_damage_is_done_in_memory_and_repaired() -> None:
    model = torch.nn.Sequential()
    model.norm = torch.nn.RMSNorm(4)
    damage = Damage()
    damage.turn_signs()  # before anything is loaded: nothing to damage
    damage.watch(replace(FakeParts().loaded(), model=model))
    damage.turn_signs(signal.SIGUSR1, None)
    assert model.norm.weight.tolist() == [-1, -1, -1, -1]
    damage.turn_signs(signal.SIGUSR1, None)
    damage.make_nan(signal.SIGUSR2, None)
    assert model.norm.weight.isnan().tolist() == [True, False, False, False]
    damage.make_nan(signal.SIGUSR2, None)
    assert model.norm.weight.tolist() == [1, 1, 1, 1]
