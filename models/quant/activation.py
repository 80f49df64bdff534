"""Dynamic quantization of activations: each token, or each group of its channels, is rounded to a grid of its own.

The grid is that of the weights (``affine``, ``mx``) with float32 scales, which are never stored:

    INT symmetric    scale = absmax / (2**(b-1) - 1),        x' = scale * round(x / scale)
    INT asymmetric   scale = (high - low) / (2**b - 1),      x' = scale * clamp(round(x / scale), -z, 2**b - 1 - z)
                     z = round(-low / scale), and zero lies between low and high
    MXINT, MXFP4     a power of two per block, as in ``mx``

With a clip ratio below 1, low, high and absmax are that much smaller, and values beyond the grid take its ends.

What comes back are the numbers that the codes stand for, in the type of the input. A product with them is what an
integer kernel computes, up to the rounding of the sum.
"""

import torch
from torch import Tensor

from ..scheme import PER_TOKEN, ActivationScheme
from . import mx

_TINY = torch.finfo(torch.float32).tiny


def quantize_activations(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """``x`` (..., in_features) rounded to the grid of each token or group; same shape, dtype and device.

    Computed in float32; a group of zeros stays zero, and so does every single zero.

    Raises:
        SchemeError: the groups do not tile the channels.
    """
    in_features = x.shape[-1]
    scheme.check(in_features, "activations")
    length = in_features if scheme.group_size == PER_TOKEN else scheme.group_size
    groups = x.float().reshape(*x.shape[:-1], in_features // length, length)
    if scheme.format != "int":
        rounded = _block_floating(groups, scheme)
    elif scheme.is_symmetric:
        rounded = _symmetric(groups, scheme.num_bits, scheme.clip_ratio)
    else:
        rounded = _asymmetric(groups, scheme.num_bits, scheme.clip_ratio)
    return rounded.flatten(-2).to(x.dtype)


def _symmetric(groups: Tensor, num_bits: int, clip_ratio: float) -> Tensor:
    largest = (1 << (num_bits - 1)) - 1
    scale = (_absmax(groups) * clip_ratio / largest).clamp_(min=_TINY)
    codes = (groups / scale).round_()
    # Without clipping no value is further out than the one that the scale is made of.
    return (codes if clip_ratio == 1 else codes.clamp_(-largest, largest)).mul_(scale)


def _asymmetric(groups: Tensor, num_bits: int, clip_ratio: float) -> Tensor:
    max_code = (1 << num_bits) - 1
    low = groups.amin(-1, keepdim=True).clamp_(max=0) * clip_ratio
    high = groups.amax(-1, keepdim=True).clamp_(min=0) * clip_ratio
    # Divided before the difference is taken, which could overflow.
    scale = (high / max_code - low / max_code).clamp_(min=_TINY)
    lowest = (low / scale).round_().clamp_(min=-max_code)
    return torch.clamp((groups / scale).round_(), lowest, lowest + max_code).mul_(scale)


def _block_floating(groups: Tensor, scheme: ActivationScheme) -> Tensor:
    scale = mx.block_scale(_absmax(groups), scheme.format, scheme.num_bits, scheme.exponent)
    steps = groups / scale
    if scheme.format == "mxfp4":
        return mx.round_e2m1(steps).mul_(scale)
    largest = (1 << (scheme.num_bits - 1)) - 1
    return steps.round_().clamp_(-largest, largest).mul_(scale)


def _absmax(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True)
