"""Reduced-rank regression: targets and corrections for layers whose inputs are not those of the dense network.

xt are the inputs of the dense network's layer, xq those that the quantized layer gets: from quantized layers before it,
and quantized themselves. What it should put out is xt W^T, and all that it has to make it from is xq. Without a rank to
keep to, the best weight is a ridge regression towards W,

    W* = argmin E||xt W^T - xq V^T||^2 + damping ||V - W||^2 = W + W (K - Rq)^T (Rq + damping)^-1,

over V, with Rq = E[xq^T xq], K = E[xq^T xt]. At damping 0, for every Q,

    E||xt W^T - xq Q^T||^2 = const + tr((W* - Q) Rq (W* - Q)^T),

so whatever minimises an output error with R does so here with W* for W and Rq for R: quantizers (GPTAQ, arXiv
2504.02692, has the same objective) and every correction. ``refit`` corrects given codes in this way: the best
rank-k approximation of W* - What weighted by Rq. That is the reduced-rank regression of LRC (arXiv 2412.07902), but for
the ridge: here it pulls the correction towards the error of the weight and not towards none, so that where xq = xt the
result is QERA-exact's, whatever the damping.

Rq is singular in practice (channels that always round to zero, fewer tokens than channels), hence the damping.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..config import FactorDtype
from ..errors import CalibrationError
from ..quant.factors import store_factors
from ..types import QUANTIZED_STATISTICS, InputStatistics, LinearWeights, Statistic
from .base import check_rank, residual
from .linalg import weighted_low_rank
from .loss import stored_weight, weighted_square
from .statistics import require

REQUIRES_REFIT = QUANTIZED_STATISTICS
"""What calibration must accumulate for the functions below."""
DEFAULT_DAMPING = 1e-2
"""Relative to the mean diagonal entry of Rq."""


def output_target(weight: Tensor, statistics: InputStatistics, damping: float = DEFAULT_DAMPING) -> Tensor:
    """W*: what, from the quantized inputs, comes closest to the outputs of ``weight`` from those of the dense network.

    Args:
        weight: (out_features, in_features)
        statistics: with ``REQUIRES_REFIT``
        damping: towards ``weight``, relative to the mean diagonal entry of Rq; 0 only for an Rq of full rank

    Returns:
        (out_features, in_features) in the dtype of ``weight``; ``weight`` itself for inputs that are all zero

    Raises:
        CalibrationError: a statistic that cannot be used, or too little damping for a singular Rq.
    """
    num_channels = weight.shape[1]
    autocorrelation = require(statistics, Statistic.QUANTIZED_AUTOCORRELATION, num_channels)
    cross = require(statistics, Statistic.CROSS_CORRELATION, num_channels)
    mean_square = float(autocorrelation.diagonal().mean())
    if mean_square == 0:
        return weight
    dense = weight.double()
    missing = (dense @ cross.T).sub_(dense @ autocorrelation)
    root = _damped_root(autocorrelation, damping * mean_square)
    return (dense + torch.cholesky_solve(missing.T, root).T).to(weight.dtype)


def refit(
    weights: LinearWeights,
    weight: Tensor,
    statistics: InputStatistics,
    factor_dtype: FactorDtype,
    rank: int | None = None,
    *,
    damping: float = DEFAULT_DAMPING,
) -> LinearWeights:
    """``weights`` with the correction that gets closest to the outputs of the dense layer, for the codes they have.

    The codes stay. So does an old correction where, as stored, it comes closer than the new one: rounding to few bits
    can cost more than the fit gained.

    Args:
        weights: codes, with or without a correction; a single matrix (SERQ) is fitted anew as a single matrix
        weight: (out_features, in_features), dense, in the coordinates of the codes
        statistics: with ``REQUIRES_REFIT``, in the same coordinates
        factor_dtype: how the factors are stored
        rank: of the new correction, unless it is a single matrix; None: that of the old one; 0, or None without an old
            one: ``weights`` are returned as they are
        damping: as in ``output_target``

    Raises:
        SchemeError: a rank above the smaller dimension of ``weight``, or one that ``factor_dtype`` does not tile.
        CalibrationError: as ``output_target``.
    """
    old = weights.correction
    if rank is None:
        rank = 0 if old is None else old.rank
    if rank == 0:
        return weights
    weighting = require(statistics, Statistic.QUANTIZED_AUTOCORRELATION, weight.shape[1])
    target = output_target(weight, statistics, damping)
    error = residual(target, weights.quantized)
    if old is not None and old.lora_down is None:
        salient = residual(weight, weights.quantized)[:, : old.rank]
        new = store_factors(_fit_single(error, salient, weighting, damping), None, factor_dtype)
    else:
        check_rank(rank, factor_dtype, weight.shape, "weight")
        lora_up, lora_down = weighted_low_rank(error, weighting, rank)
        new = store_factors(lora_up, lora_down, factor_dtype, error, weighting)
    refitted = replace(weights, correction=new)
    if old is None:
        return refitted
    before, after = (weighted_square(target - stored_weight(given), weighting) for given in (weights, refitted))
    return refitted if after < before else weights


def _fit_single(error: Tensor, salient: Tensor, weighting: Tensor, damping: float) -> Tensor:
    """The matrix C on the leading channels s that leaves the least of ``error``, by its normal equations.

    ``C (R[s, s] + lam) = error R[:, s] + lam E_s``: damped towards E_s = ``salient`` (out_features, rank), what the
    codes miss there, so that a channel which calibration never saw keeps its weight.
    """
    num_salient = salient.shape[1]
    lam = damping * float(weighting.diagonal().mean())
    if lam == 0 and not weighting.any():
        return salient
    root = _damped_root(weighting[:num_salient, :num_salient], lam)
    wanted = error.double() @ weighting[:, :num_salient] + lam * salient.double()
    return torch.cholesky_solve(wanted.T, root).T


def _damped_root(autocorrelation: Tensor, lam: float) -> Tensor:
    """Lower Cholesky factor of ``autocorrelation + lam``."""
    damped = autocorrelation.clone()
    damped.diagonal().add_(lam)
    root: Tensor
    root, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        raise CalibrationError(
            f"the statistic {Statistic.QUANTIZED_AUTOCORRELATION} of {damped.shape[0]} channels is singular; "
            f"calibrate on more tokens or raise the damping of the output objective above {lam:.3g}"
        )
    return root
