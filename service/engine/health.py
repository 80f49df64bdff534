"""Whether the engine can still be trusted: steps that fail, and values that are not finite, counted in a row."""

MAX_BROKEN_REQUESTS = 3
"""Requests in a row with values that are not finite, and no good one, after which none should be sent here."""


class EngineHealth:
    """Counts since the last success. Written by the engine's thread and read by others.

    num_failed_steps:    steps that raised an exception
    num_broken_requests: requests that ended because the model's values were not finite
    """

    def __init__(self) -> None:
        self.num_failed_steps = 0
        self.num_broken_requests = 0

    def step_failed(self) -> None:
        """A step raised an exception."""
        self.num_failed_steps += 1

    def step_succeeded(self) -> None:
        """A step ran to its end."""
        self.num_failed_steps = 0

    def request_broke(self) -> None:
        """The model's values for a request were not finite."""
        self.num_broken_requests += 1

    def request_advanced(self) -> None:
        """The model's values for a request were good."""
        self.num_broken_requests = 0

    @property
    def is_sound(self) -> bool:
        """Requests may be sent here."""
        return self.num_broken_requests < MAX_BROKEN_REQUESTS
