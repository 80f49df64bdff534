"""Shrinkage: correlations between input channels that a small calibration set exaggerates, taken back.

An autocorrelation R from few tokens knows the energy of each channel well and most correlations badly. Shrunk towards
its diagonal, ``(1 - s) R + s diag(R)`` (as Ledoit and Wolf shrink covariances, Journal of Multivariate Analysis 88,
2004, with another target, and s a setting), it keeps what is certain. The diagonal that says most is that of the
network's own channels: a rotated autocorrelation is rotated back for it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..types import InputStatistics
from .hadamard import rotate, unrotate


def shrink(autocorrelation: Tensor, share: float, rotation_block: int = 0) -> Tensor:
    """``autocorrelation`` with ``share`` of its correlations left out.

    Args:
        autocorrelation: (in_features, in_features), symmetric; not changed
        share: s, 0 (all kept) to 1 (the diagonal)
        rotation_block: of the Hadamard transform that the inputs went through; 0: none

    Returns:
        Same shape and coordinates, symmetric.
    """
    if share == 0:
        return autocorrelation
    own = autocorrelation.clone()
    if rotation_block:
        own = unrotate(unrotate(own, rotation_block).T.contiguous(), rotation_block)
    diagonal = own.diagonal().clone()
    own = torch.diagonal_scatter(own * (1 - share), diagonal)
    if rotation_block:
        own = rotate(rotate(own, rotation_block).T.contiguous(), rotation_block)
    return (own + own.T) / 2


def shrunk(statistics: InputStatistics, share: float, rotation_block: int = 0) -> InputStatistics:
    """``statistics`` with the autocorrelation, if it is there, as ``shrink`` makes it; arguments as there."""
    if statistics.autocorrelation is None or share == 0:
        return statistics
    return replace(statistics, autocorrelation=shrink(statistics.autocorrelation, share, rotation_block))
