"""What a layer loses at every rank and width, from one error matrix.

The increase of the nll of the whole network through a weight error E is, to second order, ``1/2 vec(E)^T H vec(E)``,
H being its Hessian. In expectation H is the Fisher information. With the gradient ``sum_t g_t^T x_t`` of a sequence's
nll, inputs taken as independent of output gradients, and positions and outputs as uncorrelated (K-FAC,
arXiv 1503.05671; for shared weights arXiv 1602.01407), it comes to

    1/2 tr(D E R E^T) per token,   R = E[x^T x],   D = diag(E[g_o^2]),

in nats, for g the gradient of the *summed* nll by the layer's output at one position. A correction C leaves E - C in
place of E. Without gradients D is the identity and the loss is that of the layer's own output.

Inputs are least independent of gradients where they are largest: a few channels of a few tokens (attention sinks, the
channels of down_proj that feed them) would decide R, and the loss hardly depends on them. So the diagonal of R is set
to what gradients make of it, ``E[|g|^2 x_j^2] / E[|g|^2]``, and its correlations are kept (``reweighted``).
"""

import torch
from torch import Tensor

from ..quant.clip import search_grid
from ..quant.gptq import HessianFactor
from ..quant.grid import choose_grid, dequantize, quantize
from ..quant.weighting import weigh
from ..scheme import QuantScheme


def rounding_error(weight: Tensor, scheme: QuantScheme, importance: Tensor | None = None) -> Tensor:
    """``W - What`` (out_features, in_features) float32 of rounding to nearest.

    Args:
        weight: (out_features, in_features), finite.
        scheme: number format.
        importance: (in_features,), what clip search weighs input channels with; None: the grid spans each group.

    Raises:
        SchemeError: a weight that ``scheme`` cannot hold.
    """
    scale, zero_point = choose_grid(weight, scheme) if importance is None else search_grid(weight, scheme, importance)
    return dequantize(quantize(weight, scale, zero_point, scheme)).neg_().add_(weight)


def compensated_error(rounding: Tensor, hessian: HessianFactor) -> Tensor:
    """What GPTQ makes of an error of rounding: (out_features, in_features) float32.

    GPTQ's error E solves ``E M = N``, N being what rounding misses of each channel after the channels before it were
    made up for. N has the size of the error of plain rounding, whatever was added to a weight before it was rounded:
    that error stands in for it. So ``tr(E H E^T)`` is ``sum_k D_k |n_k|^2`` (QuIP, arXiv 2307.13304), without running
    GPTQ.

    Args:
        rounding: (out_features, in_features), of rounding to nearest.
        hessian: of the layer's inputs.
    """
    ordered = rounding[:, hessian.order].float()
    solved = torch.linalg.solve_triangular(hessian.feedback.T, ordered, upper=True, left=False, unitriangular=True)
    return torch.empty_like(solved).index_copy_(1, hessian.order, solved)


def diagonal_loss(rounding: Tensor, importance: Tensor, output_weighting: Tensor | None = None) -> float:
    """``sum_oi d_o p_i N_oi^2``: the loss of independent rounding errors.

    Args:
        rounding: (out_features, in_features), N.
        importance: (in_features,), p: mean squares of the inputs, or for GPTQ the pivots of its Hessian.
        output_weighting: (out_features,), d; None: ones.
    """
    rows = rounding.double().square() @ importance.double()
    return float(rows.sum() if output_weighting is None else rows @ output_weighting.double())


def reweighted(autocorrelation: Tensor, energy: Tensor) -> Tensor:
    """``autocorrelation`` (in_features, in_features) with its channels scaled so that its diagonal is ``energy``.

    Not from a paper. Channels that are always zero stay so.
    """
    diagonal = autocorrelation.diagonal()
    is_alive = diagonal > 0
    scale = torch.where(is_alive, energy.double() / torch.where(is_alive, diagonal, 1.0), 0.0).sqrt()
    return autocorrelation * scale * scale[:, None]


def losses_by_rank(
    error: Tensor,
    lora_up: Tensor,
    lora_down: Tensor,
    autocorrelation: Tensor | None,
    output_weighting: Tensor | None = None,
) -> Tensor:
    """``tr(D (E - C_k) R (E - C_k)^T)`` for ``C_k`` the first k components, k = 0 to rank: (rank + 1,) float64.

    The components may come from another norm than this one: methods differ in what they minimise, not in what it costs
    the network. Where they are the best of this very norm, the losses are ``sum_{i > k} sigma_i^2``.

    Args:
        error: (out_features, in_features), E.
        lora_up: (out_features, rank), ordered by importance.
        lora_down: (rank, in_features).
        autocorrelation: R, (in_features, in_features), (in_features,) for a diagonal, or None for the identity.
        output_weighting: D, (out_features,); None: the identity.
    """
    error, up, down = error.double(), lora_up.double(), lora_down.double()
    weighting = None if autocorrelation is None else autocorrelation.double()
    weights = error.new_ones(len(error), 1) if output_weighting is None else output_weighting.double()[:, None]
    weighted = weigh(error, weighting) * weights
    total = (weighted * error).sum()
    overlaps = (up * (weighted @ down.T)).sum(0)
    products = (up.T @ (weights * up)) * (down @ weigh(down, weighting).T)
    squares = products.cumsum(0).cumsum(1).diagonal()
    removed = torch.nn.functional.pad(2 * overlaps.cumsum(0) - squares, (1, 0))
    return (total - removed).clamp(min=0)


def losses_by_channels(
    error: Tensor, ranks: list[int], autocorrelation: Tensor, output_weighting: Tensor | None = None
) -> list[float]:
    """``tr(D E_k R E_k^T)`` with the first k input channels of E set to zero, for each k of ``ranks``.

    For a correction that is a single matrix and takes whole channels (SERQ).

    Args:
        error: (out_features, in_features), channels in the order in which they are corrected.
        ranks: numbers of corrected channels.
        autocorrelation: (in_features, in_features), in the same order.
        output_weighting: (out_features,); None: ones.
    """
    root = None if output_weighting is None else output_weighting.double().sqrt()[:, None]
    weighted = error.double() if root is None else error.double() * root
    # tr(E R E^T) = <E^T E, R>: the products of all channels once, corners of them for every k.
    products = (weighted.T @ weighted) * autocorrelation.double()
    return [max(0.0, float(products[rank:, rank:].sum())) for rank in ranks]
