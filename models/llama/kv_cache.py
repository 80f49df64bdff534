"""Keys and values of past tokens in blocks of slots: which sequence owns which block is the caller's business."""

import torch
from torch import Tensor

from .config import LlamaConfig


class PagedKVCache:
    """Slots for the keys and values of ``num_blocks * block_size`` tokens, in every layer."""

    has_block_tables = False

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (config.num_hidden_layers, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        # Not zeroed: the system then backs a slot with memory when it is first written, not before.
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_block(config: LlamaConfig, block_size: int = 16, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one block takes, keys and values of all layers together."""
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return per_token * block_size * dtype.itemsize

    @property
    def num_slots(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """In which keys and values are kept."""
        return self._keys.dtype

    def write(self, layer_index: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store ``key`` and ``value`` (n, num_kv_heads, head_dim), any float dtype, at ``slot_mapping`` (n,) int64."""
        self._keys[layer_index].index_copy_(0, slot_mapping, key.to(self.dtype))
        self._values[layer_index].index_copy_(0, slot_mapping, value.to(self.dtype))

    def read(self, layer_index: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value at ``slots`` (...) int64: (..., num_kv_heads, head_dim) each, in the cache's dtype."""
        flat = slots.flatten()
        keys, values = self._keys[layer_index], self._values[layer_index]
        shape = (*slots.shape, *keys.shape[1:])
        return keys.index_select(0, flat).view(shape), values.index_select(0, flat).view(shape)
