"""How fast the engine has been lately, and so how long what is queued will take."""

import math

_HALF_LIFE_SECONDS = 30.0
MAX_RETRY_SECONDS = 300


class Throughput:
    """Tokens per second of the engine's busy time, prompt and output tokens alike; older steps count for less.

    Written by the engine's thread and read by others: every value is replaced as a whole.
    """

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0
        self._output_tokens = 0.0

    def step_ran(self, num_tokens: int, seconds: float) -> None:
        """A step over ``num_tokens`` tokens took ``seconds``."""
        decay = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._num_tokens = self._num_tokens * decay + num_tokens
        self._seconds = self._seconds * decay + seconds

    def request_finished(self, num_output_tokens: int) -> None:
        """A request ended with ``num_output_tokens``; their mean follows the last few requests."""
        self._output_tokens += (num_output_tokens - self._output_tokens) * (0.2 if self._output_tokens else 1.0)

    @property
    def tokens_per_second(self) -> float:
        """0.0 as long as nothing has run."""
        return self._num_tokens / self._seconds if self._seconds > 0.0 else 0.0

    def retry_seconds(self, num_queued_tokens: int, num_sequences: int) -> int:
        """Whole seconds, 1 to 300, in which prompts of ``num_queued_tokens`` and the outputs of ``num_sequences`` run.

        An output is taken to be as long as those before it; 1 as long as nothing has run.
        """
        if not self.tokens_per_second:
            return 1
        num_tokens = num_queued_tokens + num_sequences * self._output_tokens
        return min(max(1, math.ceil(num_tokens / self.tokens_per_second)), MAX_RETRY_SECONDS)
