"""How much one API key may ask for: requests at the same time, and requests per minute."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass


class KeyLimitError(Exception):
    """The key has used up its share; it may ask again in ``retry_seconds``."""

    def __init__(self, message: str, retry_seconds: int) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(slots=True)
class TokenBucket:
    """Holds at most ``capacity`` tokens and gains ``per_second`` of them; it starts full.

    seconds: when ``num_tokens`` was true
    """

    capacity: float
    per_second: float
    num_tokens: float
    seconds: float

    def take(self, now: float) -> float:
        """Take one token: 0.0, or how many seconds it takes until there is one."""
        self.num_tokens = min(self.capacity, self.num_tokens + (now - self.seconds) * self.per_second)
        self.seconds = now
        if self.num_tokens < 1.0:
            return (1.0 - self.num_tokens) / self.per_second
        self.num_tokens -= 1.0
        return 0.0


class KeyLimits:
    """Counts what every key has under way; used on the event loop only. A limit of None does not limit."""

    def __init__(
        self,
        max_concurrent: int | None,
        requests_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent = max_concurrent
        self._requests_per_minute = requests_per_minute
        self._clock = clock
        self._num_running: dict[str, int] = defaultdict(int)
        self._buckets: dict[str, TokenBucket] = {}

    def acquire(self, key_id: str) -> None:
        """Count one request of ``key_id``; ``release`` must follow.

        Raises:
            KeyLimitError: a limit is reached, and nothing was counted.
        """
        if self._max_concurrent is not None and self._num_running[key_id] >= self._max_concurrent:
            raise KeyLimitError(f"This key has {self._max_concurrent} requests under way, its limit.", 1)
        wait = self._take(key_id)
        if wait > 0.0:
            message = f"This key may make {self._requests_per_minute} requests per minute."
            raise KeyLimitError(message, math.ceil(wait))
        self._num_running[key_id] += 1

    def release(self, key_id: str) -> None:
        """A request of ``key_id`` has ended."""
        self._num_running[key_id] -= 1
        if not self._num_running[key_id]:
            del self._num_running[key_id]

    def num_running(self, key_id: str) -> int:
        """Requests of ``key_id`` that are under way."""
        return self._num_running.get(key_id, 0)

    def _take(self, key_id: str) -> float:
        if self._requests_per_minute is None:
            return 0.0
        now, most = self._clock(), float(self._requests_per_minute)
        bucket = self._buckets.setdefault(key_id, TokenBucket(most, most / 60.0, most, now))
        return bucket.take(now)
