"""The Pareto front of size and quality."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the ``points`` (bits, perplexity) that no other is at least as good as in both and better in one.

    Both are better when smaller; of equal points all are on the front. In the order of rising bits. Points that are
    not finite are never on it.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for index in sorted(finite, key=lambda index: (points[index], index)):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
