"""The key-value cache of the native kernels: blocks of 16 tokens, laid out as they are read.

Keys lie channel by channel, sixteen tokens at a time, so that one query channel meets sixteen keys in one register;
values lie token by token. 8-bit caches have one float32 scale per token and head.
"""

import torch

from ..kernels.native.program import CacheLayer
from ..kernels.native.structs import CACHE_BLOCK
from .config import LlamaConfig

_SCALE_BYTES = 4


class NativeKVCache:
    """Keys and values of ``num_blocks * 16`` tokens in every layer; which sequence owns which block is the caller's.

    dtype: float16, or int8
    num_layers: layers with memory of their own; None: all. With one, each layer overwrites what the one before it left,
        which serves a batch of whole sequences that is run once
    """

    block_size = CACHE_BLOCK
    has_block_tables = True

    def __init__(
        self, config: LlamaConfig, num_blocks: int, dtype: torch.dtype = torch.float16, num_layers: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.dtype = dtype
        heads, channels = config.num_key_value_heads, config.head_dim
        shape = (num_layers or config.num_hidden_layers, num_blocks, heads)
        # Not zeroed: the system then backs a block with memory when it is first written, not before.
        self._keys = torch.empty(*shape, channels, CACHE_BLOCK, dtype=dtype)
        self._values = torch.empty(*shape, CACHE_BLOCK, channels, dtype=dtype)
        has_scales = dtype == torch.int8
        self._key_scale = torch.empty(*shape, CACHE_BLOCK) if has_scales else None
        self._value_scale = torch.empty(*shape, CACHE_BLOCK) if has_scales else None

    @staticmethod
    def bytes_per_block(config: LlamaConfig, dtype: torch.dtype = torch.float16) -> int:
        """Bytes that one block takes, keys and values of all layers together."""
        per_head = config.head_dim * dtype.itemsize + (_SCALE_BYTES if dtype == torch.int8 else 0)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * per_head * CACHE_BLOCK

    @property
    def num_slots(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * CACHE_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it takes its bytes with."""
        tensors = (self._keys, self._values, self._key_scale, self._value_scale)
        return [tensor for tensor in tensors if tensor is not None]

    def layer(self, index: int) -> CacheLayer:
        """The memory of one layer."""
        index %= len(self._keys)
        return CacheLayer(
            self._keys[index],
            self._values[index],
            None if self._key_scale is None else self._key_scale[index],
            None if self._value_scale is None else self._value_scale[index],
        )
