"""The policy that sheds rank, against its definition over the whole past."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.rank_policy import RankPolicy

QUEUES = st.lists(st.integers(0, 20), min_size=1, max_size=60)


def is_shed(past: list[int], shed_at: int) -> bool:
    """Since the queue was last half as long as that or shorter, it has been that long."""
    calm = [index for index, num_waiting in enumerate(past) if num_waiting <= shed_at // 2]
    return any(num_waiting >= shed_at for num_waiting in past[calm[-1] + 1 if calm else 0 :])


@given(QUEUES, st.integers(1, 20), st.integers(0, 32))
def test_the_floor_is_given_from_a_long_queue_until_one_half_as_long(
    queue: list[int], shed_at: int, floor: int
) -> None:
    policy = RankPolicy(32, floor, shed_at)
    for index, num_waiting in enumerate(queue):
        wanted = floor if is_shed(queue[: index + 1], shed_at) else 32
        assert policy.rank_at(num_waiting) == wanted
        assert policy.give(num_waiting) == wanted
        assert policy.give(num_waiting) == wanted  # the same queue once more changes nothing


@given(QUEUES, st.integers(1, 20), QUEUES)
def test_looking_decides_nothing(queue: list[int], shed_at: int, looks: list[int]) -> None:
    watched, alone = RankPolicy(32, 0, shed_at), RankPolicy(32, 0, shed_at)
    for num_waiting in queue:
        for look in looks:
            watched.rank_at(look)
        assert watched.give(num_waiting) == alone.give(num_waiting)


@given(QUEUES, st.integers(1, 20))
def test_a_change_takes_a_change_of_half_the_threshold(queue: list[int], shed_at: int) -> None:
    policy = RankPolicy(32, 0, shed_at)
    given_ranks = [policy.give(num_waiting) for num_waiting in queue]
    changes = [index for index in range(1, len(queue)) if given_ranks[index] != given_ranks[index - 1]]
    for before, after in pairwise(changes):
        assert abs(queue[after] - queue[before]) >= shed_at - shed_at // 2


@given(QUEUES)
def test_without_a_threshold_nothing_is_shed(queue: list[int]) -> None:
    policy = RankPolicy(32, 4)
    assert {policy.give(num_waiting) for num_waiting in queue} == {32}


@pytest.mark.parametrize(("full", "floor", "shed_at"), [(32, 33, 4), (32, -1, 4), (0, 1, None), (32, 0, 0)])
def test_impossible_settings_are_refused(full: int, floor: int, shed_at: int | None) -> None:
    with pytest.raises(ValueError, match="rank"):
        RankPolicy(full, floor, shed_at)
