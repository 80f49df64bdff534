"""Keys and values of past tokens in blocks of slots: which sequence owns which block is the caller's business.

In 8 bits, each token's key and value of each head has a scale of its own, its largest magnitude over 127: what is read
back differs from what was written by half a step, which is 1/254 of that magnitude, at most.
"""

import torch
from torch import Tensor

from ..kernels.paged import PagedLayer
from .config import LlamaConfig

_SCALE_DTYPE = torch.float32
_LARGEST_CODE = 127


class PagedKVCache:
    """Slots for the keys and values of ``num_blocks * block_size`` tokens, in every layer.

    dtype:            a float type, or int8
    has_block_tables: spans name their blocks, not their slots
    has_scratch:      there is one block more, behind those that are handed out, for rows that only fill up a batch
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        has_block_tables: bool = False,
        has_scratch: bool = False,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.has_block_tables = has_block_tables
        self.has_scratch = has_scratch
        num_slots = (num_blocks + has_scratch) * block_size
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, config.head_dim)
        self._keys = _Slots(shape, dtype, device)
        self._values = _Slots(shape, dtype, device)

    @staticmethod
    def bytes_per_block(config: LlamaConfig, block_size: int = 16, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one block takes, keys and values of all layers together."""
        per_head = config.head_dim * dtype.itemsize + (_SCALE_DTYPE.itemsize if dtype == torch.int8 else 0)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * per_head * block_size

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
        return self._keys.codes.dtype

    def write(self, layer_index: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` (n, num_kv_heads, head_dim), any float dtype, at ``slot_mapping`` (n,) int64.

        Returns:
            Both as they will be read.
        """
        return self._keys.write(layer_index, key, slot_mapping), self._values.write(layer_index, value, slot_mapping)

    def layer(self, layer_index: int) -> PagedLayer:
        """The memory of one layer, as kernels take it."""
        keys, values = self._keys, self._values
        return PagedLayer(
            keys.codes[layer_index],
            values.codes[layer_index],
            None if keys.scales is None else keys.scales[layer_index],
            None if values.scales is None else values.scales[layer_index],
            self.block_size,
        )

    def read(self, layer_index: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value at ``slots`` (...) int64: (..., num_kv_heads, head_dim) each.

        In the cache's dtype; from 8 bits, float32.
        """
        return self._keys.read(layer_index, slots), self._values.read(layer_index, slots)


class _Slots:
    """Keys, or values.

    codes:  (num_layers, num_slots, num_kv_heads, head_dim)
    scales: (num_layers, num_slots, num_kv_heads, 1) by which to multiply them; None: they are the values themselves
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        # Not zeroed: the system then backs a slot with memory when it is first written, not before.
        self.codes = torch.empty(shape, dtype=dtype, device=device)
        is_scaled = dtype == torch.int8
        self.scales = torch.empty(*shape[:3], 1, dtype=_SCALE_DTYPE, device=device) if is_scaled else None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(self, layer_index: int, values: Tensor, slot_mapping: Tensor) -> Tensor:
        if self.scales is None:
            codes = read_back = values.to(self.codes.dtype)
        else:
            values = values.float()
            scales = values.abs().amax(-1, keepdim=True) / _LARGEST_CODE
            # Zeros have a scale of zero, and codes that are read back as zeros whatever they are divided by.
            codes = (values / torch.where(scales > 0, scales, 1.0)).round_().to(self.codes.dtype)
            read_back = codes * scales
            self.scales[layer_index].index_copy_(0, slot_mapping, scales)
        self.codes[layer_index].index_copy_(0, slot_mapping, codes)
        return read_back

    def read(self, layer_index: int, slots: Tensor) -> Tensor:
        flat = slots.flatten()
        codes = self.codes[layer_index]
        values = codes.index_select(0, flat)
        if self.scales is not None:
            values = values * self.scales[layer_index].index_select(0, flat)
        return values.view(*slots.shape, *codes.shape[1:])
