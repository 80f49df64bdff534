"""Moving a factor per channel from one parameter into another that the channel runs through."""

import torch
from torch import Tensor


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` (out_features, in_features) with column j times ``scale[j]``: takes in what its input was divided by.

    A norm's gain folds into the layers that read it in this way, and leaves a gain of one behind.

    Returns:
        At least float32: the product of two 16-bit numbers does not fit in 16 bits.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) * scale.to(weight.device, dtype)


def divide_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """``tensor``, a weight (out_features, in_features), a bias or a gain (out_features,), with row o over ``scale[o]``.

    Returns:
        At least float32.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(dtype) / scale.to(tensor.device, dtype).view(-1, *[1] * (tensor.dim() - 1))
