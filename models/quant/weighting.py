"""The weighting of input channels that output errors are measured with."""

from torch import Tensor


def weigh(rows: Tensor, weighting: Tensor | None) -> Tensor:
    """``rows @ R`` for ``rows`` (n, in_features); R None (identity), (in_features,) (diagonal), or the full matrix."""
    if weighting is None:
        return rows
    return rows * weighting if weighting.dim() == 1 else rows @ weighting
