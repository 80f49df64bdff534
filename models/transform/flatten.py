"""How much each input channel is divided by, so that no channel alone sets the range of the quantized activations.

``s_j = a_j**alpha / w_j**(1 - alpha)``, a_j the largest magnitude of channel j over the calibration set, w_j that of
column j of the weights which read it (SmoothQuant, arXiv 2211.10438, equation 4). ``alpha = 1`` is SERQ's static
flattening (arXiv 2603.08185, stage 1): ``s_j = a_j``, every channel ends within [-1, 1] and the weights carry the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError

NEGLIGIBLE = 1e-4
"""Of the median absmax: a channel below it counts as never active."""


def flatten_scale(absmax: Tensor, weights: Tensor, alpha: float, where: str) -> Tensor:
    """Scales of one layer's input channels.

    A channel that is never active gets the median of the others' scales (SERQ's published code stops with an error):
    nothing is known about it, and a tiny divisor would turn its first activity while serving into the largest outlier
    of all. A column of zeros counts as the smallest that is not. Where nothing is active, every scale is 1.

    Args:
        absmax: (in_features,), largest magnitude of each input channel.
        weights: (in_features,), largest magnitude of each column, from ``column_absmax``.
        alpha: 0 (all from the weights) to 1 (all from the activations).
        where: the layer, for the message.

    Returns:
        (in_features,) float64, positive and finite.

    Raises:
        CalibrationError: a magnitude is negative or not finite.
    """
    absmax, weights = absmax.double(), weights.double()
    for what, values in (("activations", absmax), ("weights", weights)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise CalibrationError(
                f"{where}: the largest {what} of its input channels are not all finite; "
                "look for overflow or NaN in the checkpoint or the calibration text"
            )
    if not bool(absmax.any()):
        return torch.ones_like(absmax)
    is_active = absmax >= NEGLIGIBLE * absmax[absmax > 0].median()
    used = weights[weights > 0]
    weights = weights.clamp_min(float(used.min())) if len(used) else torch.ones_like(weights)
    scale = absmax**alpha / weights ** (1 - alpha)
    return torch.where(is_active, scale, scale[is_active].median())


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude per input channel, (in_features,), of weights (out_features, in_features) with one input."""
    return torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)


def share_over_query_heads(values: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """The largest of ``values`` over the query heads that read one key-value head, in the place of each of them.

    One channel of v_proj feeds the same channel of all of its query heads, so that it can take in only one scale.

    Args:
        values: (num_heads * head_dim,), a magnitude per input channel of o_proj.

    Returns:
        The same shape.
    """
    heads = values.view(num_kv_heads, -1, head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(values.shape)
