"""How much of the corrections new requests get: all, or less while many wait. Numbers only: no tensors, no clocks.

Components beyond the floor cost time in every step and buy accuracy; a request in the queue gets neither. So from
``shed_at`` waiting requests on, new ones get the floor. They get all again once no more than half as many wait: between
the two nothing changes, so that one request more or less does not make the rank flap.
"""


class RankPolicy:
    """Decides the rank of requests that leave it open.

    full:    rank of the model: of its layers' corrections, the largest
    floor:   what new requests get under pressure, at most ``full``
    shed_at: waiting requests from which on there is pressure; None: there never is
    """

    def __init__(self, full: int, floor: int = 0, shed_at: int | None = None) -> None:
        if not 0 <= floor <= full:
            raise ValueError(f"a floor of {floor} is not a rank of a model that has {full}")
        if shed_at is not None and shed_at < 1:
            raise ValueError(f"rank cannot be shed from {shed_at} waiting requests on: that is always")
        self.full = full
        self.floor = floor
        self.shed_at = shed_at
        self._is_shedding = False

    @property
    def restore_at(self) -> int | None:
        """Waiting requests down to which the floor lasts."""
        return None if self.shed_at is None else self.shed_at // 2

    def rank_at(self, num_waiting: int) -> int:
        """What a request would get now, with ``num_waiting`` others in the queue; nothing is decided by asking."""
        return self.floor if self._sheds_at(num_waiting) else self.full

    def give(self, num_waiting: int) -> int:
        """The rank of a new request, with ``num_waiting`` others in the queue."""
        self._is_shedding = self._sheds_at(num_waiting)
        return self.rank_at(num_waiting)

    def _sheds_at(self, num_waiting: int) -> bool:
        if self.shed_at is None:
            return False
        return num_waiting > self.shed_at // 2 if self._is_shedding else num_waiting >= self.shed_at
