"""Who is let in: seats and queued tokens, counted on the event loop before any work is done for a call.

A seat is one sequence, from admission to its last token. Queued tokens are those of prompts that are not computed yet:
they, not the number of sequences, decide how long a newcomer waits. Both are reserved together or not at all, the
tokens by an estimate until the prompt is tokenized, and given back exactly once, by whoever closes the reservation.
"""

from .throughput import Throughput


class QueueFullError(Exception):
    """No room is left; there may be in ``retry_seconds``.

    is_about_tokens: there are seats, but too many prompt tokens wait already
    """

    def __init__(self, retry_seconds: int, *, is_about_tokens: bool = False) -> None:
        super().__init__("the queue is full")
        self.retry_seconds = retry_seconds
        self.is_about_tokens = is_about_tokens


class DrainingError(Exception):
    """The server is shutting down and takes no new work."""


class Admission:
    """Counts what is admitted.

    capacity:          sequences admitted at the same time, running and waiting together
    max_queued_tokens: prompt tokens that may wait; None: any number. A call alone is always let in, however long.
    """

    def __init__(self, capacity: int, max_queued_tokens: int | None, throughput: Throughput) -> None:
        self.capacity = capacity
        self.max_queued_tokens = max_queued_tokens
        self.num_sequences = 0
        self.num_queued_tokens = 0
        self._throughput = throughput

    @property
    def retry_seconds(self) -> int:
        """In how many seconds what is admitted now will be done, as far as the recent past tells."""
        return self._throughput.retry_seconds(self.num_queued_tokens, self.num_sequences)

    def reserve(self, num_sequences: int, num_tokens: int) -> "Reservation":
        """Room for ``num_sequences`` whose prompts hold about ``num_tokens`` together.

        Raises:
            QueueFullError: there is too little, and nothing was counted.
        """
        if self.num_sequences + num_sequences > self.capacity:
            raise QueueFullError(self.retry_seconds)
        self._check_tokens(num_tokens)
        self.num_sequences += num_sequences
        self.num_queued_tokens += num_tokens
        return Reservation(self, num_sequences, num_tokens)

    def resize(self, reservation: "Reservation", num_tokens: int) -> None:
        """The prompts of ``reservation`` turned out to hold ``num_tokens``.

        Raises:
            QueueFullError: that is too many beside the others; the reservation stays as it was.
        """
        if num_tokens > reservation.num_tokens:
            self._check_tokens(num_tokens, reservation.num_tokens)
        self.num_queued_tokens += num_tokens - reservation.num_tokens
        reservation.num_tokens = num_tokens

    def release(self, reservation: "Reservation", num_sequences: int, num_tokens: int) -> None:
        """Give back a part of ``reservation``, never more than it holds."""
        num_sequences = min(num_sequences, reservation.num_sequences)
        num_tokens = min(num_tokens, reservation.num_tokens)
        reservation.num_sequences -= num_sequences
        reservation.num_tokens -= num_tokens
        self.num_sequences -= num_sequences
        self.num_queued_tokens -= num_tokens

    def _check_tokens(self, num_tokens: int, num_held: int = 0) -> None:
        others = self.num_queued_tokens - num_held
        if self.max_queued_tokens is not None and others and others + num_tokens > self.max_queued_tokens:
            raise QueueFullError(self.retry_seconds, is_about_tokens=True)


class Reservation:
    """What one call holds of an ``Admission``."""

    def __init__(self, admission: Admission, num_sequences: int, num_tokens: int) -> None:
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens
        self._admission = admission

    def resize(self, num_tokens: int) -> None:
        """See ``Admission.resize``."""
        self._admission.resize(self, num_tokens)

    def release(self, num_sequences: int, num_tokens: int) -> None:
        """See ``Admission.release``."""
        self._admission.release(self, num_sequences, num_tokens)

    def close(self) -> None:
        """Give everything back; once is enough, twice does no harm."""
        self._admission.release(self, self.num_sequences, self.num_tokens)
