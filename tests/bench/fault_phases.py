"""A fault run's phases: what is sent and broken in each, which alerts must fire for it and which may."""

import signal
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """A part of the run.

    share:    of the run's duration
    load:     clients by kind, see ``fault_load``
    must:     alerts that have to fire because of it
    may:      alerts that are a consequence, depending on how fast the machine is
    damage:   signal that damages the weights when it begins and repairs them when it ends
    restarts: how often the server is stopped and started
    """

    name: str
    share: float
    load: dict[str, int] = field(default_factory=dict)
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    damage: signal.Signals | None = None
    restarts: int = 0


def alerts(*names: str) -> frozenset[str]:
    """Names without their common beginning."""
    return frozenset(f"Qerve{name}" for name in names)


USERS = {"complete": 2, "score": 1}
SLOW = alerts("SlowFirstToken")
PHASES = (
    Phase("mixed load", 0.12, USERS),
    Phase("clients leave", 0.12, {**USERS, "leave": 3}, alerts("ClientsLeave"), SLOW),
    Phase("prompts that do not fit", 0.12, {**USERS, "oversize": 2}, alerts("OversizePrompts"), alerts("ClientsLeave")),
    Phase("deadlines that cannot be met", 0.10, {**USERS, "deadline": 2}, alerts("DeadlinesMissed"), SLOW),
    Phase(
        "more requests every second", 0.20, {"flood": 80}, SLOW | alerts("QueueGrowing", "Rejecting"),
        alerts("DeadlinesMissed"),
    ),
    Phase("weights with turned signs", 0.08, {}, alerts("CanaryDrift", "NotReady"), SLOW, signal.SIGUSR1),
    Phase(
        "weights with a NaN", 0.08, {"complete": 2}, alerts("NonFiniteLogits", "ServerErrors"),
        alerts("CanaryDrift", "NotReady", "ReadinessFlapping"), signal.SIGUSR2,
    ),
    Phase(
        "restarts", 0.12, {"complete": 1}, alerts("ReadinessFlapping", "TargetDown"),
        alerts("NotReady", "ServerErrors", "ClientsLeave", "NonFiniteLogits"), restarts=3,
    ),
    Phase("mixed load again", 0.06, USERS, may=alerts("ReadinessFlapping")),
)  # fmt: skip
NOT_INJECTED = {
    "QerveOutOfMemoryNear": "needs a control group to fill",
    "QerveCanaryStale": "needs a day",
}
