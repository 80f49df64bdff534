"""Statistics between their uses: in the host's memory, where a device holds those of one input at a time.

The autocorrelation of an input of n channels takes 8 n^2 bytes. The four inputs of a decoder layer of LLaMA-3-70B come
to 7.6 GiB, the widest one alone to 6.1; building a linear layer takes several matrices of its input's size beside it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..types import InputStatistics

_HOST = torch.device("cpu")


class Moved:
    """Copies of tensors on another device and back, each made once. On the CPU a tensor is its own copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By identity, original and copy; holding both keeps the identities from being given away again.
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def to_device(self, statistics: InputStatistics) -> InputStatistics:
        """``statistics`` on the device."""
        return statistics.mapped(lambda tensor: self._copy(tensor, self._device))

    def to_host(self, statistics: InputStatistics) -> InputStatistics:
        """``statistics`` in the host's memory: what came from there is what it was."""
        return statistics.mapped(lambda tensor: self._copy(tensor, _HOST))

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device.type == device.type:
            return tensor
        known = self._pairs.get(id(tensor))
        if known is not None:
            return known[1]
        copy = tensor.to(device)
        self._pairs |= {id(tensor): (tensor, copy), id(copy): (copy, tensor)}
        return copy


def resting(statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """``statistics`` by child path in the host's memory; what several share stays shared."""
    moved = Moved(_HOST)
    return {child: moved.to_host(of_input) for child, of_input in statistics.items()}
