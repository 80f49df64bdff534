"""The Pareto front against its definition, point by point."""

import math

from hypothesis import given
from hypothesis import strategies as st

from models.report.pareto import pareto_front
from models.report.table import front_names
from tests.support.comparisons import example

COORDINATE = st.one_of(st.integers(0, 6).map(float), st.sampled_from([math.inf, math.nan]))


def dominates(first, second):
    return first[0] <= second[0] and first[1] <= second[1] and first != second


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=14))
def test_the_front_is_what_no_other_point_beats(points):
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    expected = {i for i in finite if not any(dominates(points[j], points[i]) for j in finite)}
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def test_dense_and_external_rows_are_never_on_it():
    assert front_names(example(), "wiki") == ["rtn-w3", "rtn-w4", "qera-w4-r8", "qera-w4-r32"]
