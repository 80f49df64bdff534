"""An order of input channels: those that matter most first, where SERQ's one matrix reads them and groups are alike.

The hidden channels of the MLP can take any order for free, as rows of gate_proj and up_proj and columns of down_proj
(SERQ, arXiv 2603.08185, stage 3).
"""

import torch
from torch import Tensor

from ..errors import CalibrationError


def descending_order(statistic: Tensor, where: str) -> Tensor:
    """Channels by falling ``statistic`` (in_features,), equal ones as they come.

    Returns:
        (in_features,) int32: ``x[..., order]`` has the largest first.

    Raises:
        CalibrationError: a value is not finite; ``where`` names the layer.
    """
    if not bool(statistic.isfinite().all()):
        raise CalibrationError(f"{where}: the statistic that orders its channels is not finite everywhere")
    return statistic.argsort(descending=True, stable=True).to(torch.int32)
