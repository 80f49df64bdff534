"""What the server keeps about one HTTP request besides its content, for limits, deadlines and the log."""

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from .engine.generation import Generation
from .keys import ANONYMOUS


@dataclass(slots=True)
class RequestRecord:
    """One request, from its first byte to the log line about it.

    key_id:           whose API key it came with
    deadline_seconds: when it must have ended, on the monotonic clock; None: not known yet
    generation:       its share of the engine, if it got one
    """

    request_id: str
    started_seconds: float = field(default_factory=time.monotonic)
    key_id: str = ANONYMOUS
    deadline_seconds: float | None = None
    generation: Generation | None = None

    @property
    def cache_salt(self) -> str:
        """What keeps its cached prefixes apart from those of other keys, so that timing tells nothing about them."""
        return self.key_id

    @property
    def remaining_seconds(self) -> float | None:
        """Time until the deadline, 0.0 when it is over; None: there is no deadline."""
        return None if self.deadline_seconds is None else max(0.0, self.deadline_seconds - time.monotonic())


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request behind ``scope``."""
    record: RequestRecord = scope["state"]["record"]
    return record
