"""Whether the engine can still be trusted: steps that fail, and logits that are not finite, counted in a row."""

MAX_BROKEN_STEPS = 3
"""Steps in a row with logits that are not finite, and none that is, after which no requests should be sent here."""


class EngineHealth:
    """Counts since the last success. Written by the engine's thread and read by others.

    num_failed_steps: steps that raised an exception
    num_broken_steps: steps in which logits were not finite and no request got a token
    """

    def __init__(self) -> None:
        self.num_failed_steps = 0
        self.num_broken_steps = 0

    def step_failed(self) -> None:
        """A step raised an exception."""
        self.num_failed_steps += 1

    def step_succeeded(self, num_tokens: int, num_broken: int) -> None:
        """A step ran: ``num_tokens`` requests got a token, ``num_broken`` had logits that are not finite."""
        self.num_failed_steps = 0
        if num_tokens:
            self.num_broken_steps = 0
        elif num_broken:
            self.num_broken_steps += 1

    @property
    def is_sound(self) -> bool:
        """Requests may be sent here."""
        return self.num_broken_steps < MAX_BROKEN_STEPS
