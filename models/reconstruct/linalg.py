"""The one problem behind every method: the best rank-k approximation of an error matrix in a weighted norm.

Minimise ``tr((E - C) R (E - C)^T)`` over C of rank k, where E (out_features, in_features) is the weight error and R
weighs the input channels: identity, diagonal, or a full autocorrelation. The textbook solution
``C = SVD_k(E S^T) S^-T`` with ``S^T S = R`` needs a root of R and its inverse, and R is singular as soon as a channel
is dead or there are fewer tokens than channels. The leading eigenvectors V of ``G = E R E^T`` give the same C:

    C = V (V^T E)        loss = tr(G) - (sum of the k largest eigenvalues of G)

without root or inverse, for every positive semi-definite R. LQER (arXiv 2402.02446) and QERA (arXiv 2410.06040,
theorem 1) are cases of it. A diagonal D that weighs the output channels too, ``tr(D (E - C) R (E - C)^T)``, is the same
problem for the error ``sqrt(D) E``. float64 throughout: R spans eight orders of magnitude and more, and what is left
after the correction lies in its small directions.
"""

import torch
from torch import Tensor

from ..quant.weighting import weigh

_EXACT_SIZE = 1024
_OVERSAMPLING = 16
_MAX_BLOCKS = 8
_TOLERANCE = 1e-3
_SMALLEST_OUTPUT_WEIGHT = 1e-6
_SEED = 0


def weighted_low_rank(
    error: Tensor, weighting: Tensor | None, rank: int, output_weighting: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best approximation ``lora_up @ lora_down`` of ``error`` in the norm that the weightings define.

    Exact up to a smaller dimension of 1024 and for large ranks; beyond that within 0.1 % of the least loss.

    Args:
        error: (out_features, in_features)
        weighting: None for the identity, (in_features,) for a diagonal R, (in_features, in_features) for a full one;
            positive semi-definite, possibly singular
        rank: 1 to the smaller dimension
        output_weighting: None for the identity, or the diagonal of D, (out_features,), not negative. Below a millionth
            of its mean it counts as that much: an output that does not matter still gets its best combination of the
            components

    Returns:
        lora_up (out_features, rank) and lora_down (rank, in_features), float64, ordered by the loss that each component
        removes. The columns of lora_up are orthonormal, with an output weighting those of ``sqrt(D) lora_up``
    """
    error = error.double()
    weighting = None if weighting is None else weighting.double()
    if output_weighting is None:
        lora_up = _loss_directions(error, weighting, rank)
        return lora_up, lora_up.T @ error
    scale = _guarded_root(output_weighting)[:, None]
    error = error * scale
    lora_up = _loss_directions(error, weighting, rank)
    return lora_up / scale, lora_up.T @ error


def component_losses(lora_down: Tensor, weighting: Tensor | None) -> Tensor:
    """Loss that each component of a solution without output weighting removes: the eigenvalues of G, (rank,) float64.

    Args:
        lora_down: (rank, in_features), beside a lora_up with orthonormal columns
        weighting: as in ``weighted_low_rank``
    """
    lora_down = lora_down.double()
    weighting = None if weighting is None else weighting.double()
    return (weigh(lora_down, weighting) * lora_down).sum(1)


def _loss_directions(error: Tensor, weighting: Tensor | None, rank: int) -> Tensor:
    """Leading eigenvectors of ``G = E R E^T``, (out_features, rank), by the cheapest way for the shape of E."""
    num_rows, num_columns = error.shape
    if min(num_rows, num_columns) > max(_EXACT_SIZE, (rank + _OVERSAMPLING) * _MAX_BLOCKS):
        return _krylov_eigenvectors(error, weighting, rank)
    if num_rows <= num_columns:
        return _leading_eigenvectors(weigh(error, weighting) @ error.T, rank)
    # G has rank in_features at most: its eigenvectors lie in the column space of E
    basis, triangle = torch.linalg.qr(error)
    leading: Tensor = basis @ _leading_eigenvectors(weigh(triangle, weighting) @ triangle.T, rank)
    return leading


def _guarded_root(output_weighting: Tensor) -> Tensor:
    values = output_weighting.double()
    mean = values.mean()
    return torch.where(mean > 0, values.clamp(min=_SMALLEST_OUTPUT_WEIGHT * mean), 1.0).sqrt()


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues, largest first, as columns."""
    eigenvectors: Tensor = torch.linalg.eigh((symmetric + symmetric.T).div_(2)).eigenvectors
    return eigenvectors[:, -count:].flip(1)


def _krylov_eigenvectors(error: Tensor, weighting: Tensor | None, count: int) -> Tensor:
    """Leading eigenvectors of ``G = E R E^T`` from a block Krylov space; G itself is never formed.

    Starts with a block of random directions (seeded) and appends the image of the last block under G; Rayleigh-Ritz on
    all blocks together converges far faster than power iteration on one. Stops when a block removed less than a
    thousandth of what remains: the next ones would remove less by one more order of magnitude each. The eigenvalues
    that the space holds beyond ``count`` serve as a lower bound of what remains, the trace of G being too expensive.
    """
    width = count + _OVERSAMPLING
    generator = torch.Generator().manual_seed(_SEED)
    block = torch.randn(error.shape[0], width, generator=generator, dtype=error.dtype).to(error.device)
    basis = images = error.new_empty(error.shape[0], 0)
    captured = 0.0
    while True:
        block = _orthonormal_complement(block, basis)
        basis = torch.cat([basis, block], 1)
        images = torch.cat([images, error @ weigh(block.T @ error, weighting).T], 1)
        projected = basis.T @ images
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        leading, remaining = float(values[-count:].sum()), float(values[:-count].clamp(min=0).sum())
        if leading - captured <= _TOLERANCE * remaining or basis.shape[1] == width * _MAX_BLOCKS:
            ritz: Tensor = basis @ vectors[:, -count:].flip(1)
            return ritz
        block, captured = images[:, -width:], leading


def _orthonormal_complement(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that span ``block`` outside of ``basis``; a second pass removes what rounding leaves."""
    for _ in range(2):
        block, _triangle = torch.linalg.qr(block - basis @ (basis.T @ block))
    return block
