"""NF4: sixteen values at the quantiles of a normal distribution, under the absmax of each block.

Source: QLoRA (arXiv 2305.14314), appendix E, which lists them. They come of evenly spaced probabilities from
``(1 - 1/32 + 1 - 1/30) / 2`` towards one half, eight on the positive side and seven on the negative one, mirrored,
scaled to [-1, 1], with an exact zero between them.
"""

from itertools import pairwise

import torch
from torch import Tensor

# fmt: off
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""In rising order: code 0 is -1."""
_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(NF4_VALUES))


def encode(steps: Tensor) -> Tensor:
    """Nearest codes (uint8) of ``steps`` (float32), which lie in [-1, 1] within their blocks."""
    # Counting the bounds below is several times faster than a binary search among so few.
    codes = torch.zeros_like(steps, dtype=torch.uint8)
    for bound in _BOUNDS:
        codes += steps > bound
    return codes


def decode(codes: Tensor) -> Tensor:
    """Values of ``codes``, float32."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=codes.device)[codes.long()]
