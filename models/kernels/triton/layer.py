"""What the layers of both kinds of inputs have in common: single rows, and the call on the device of its input."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...types import RowRanks
from .pack import PackedWeight


class TritonLinear(ABC):
    """weight: codes and scales in the kernels' layout"""

    __slots__ = ()
    weight: PackedWeight

    def rows(self, indices: Tensor) -> Tensor:
        """See ``RowReader``."""
        return self.weight.dequantize(indices)

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """See ``PreparedLinear``."""
        output = x.new_empty(len(x), self.weight.out_features)
        if not len(x):
            return output
        if not x.is_cuda:
            return self._run(x, row_ranks, output)
        # Triton launches on torch's current device, whatever the tensors' is
        with torch.cuda.device(x.device):
            return self._run(x, row_ranks, output)

    @abstractmethod
    def _run(self, x: Tensor, row_ranks: RowRanks | None, output: Tensor) -> Tensor:
        """Write the layer's output of ``x``, at least one row, into ``output`` and return it."""
