"""The formats taken apart again, from their definitions alone: shares no code with what writes them.

Everything goes through single bits (``numpy.unpackbits``), which is slow and hard to get wrong.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def fields_of_words(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Unsigned fields of ``num_bits``, lowest bits first, dense across 32-bit words.

    Args:
        words: (rows, num_words) int32.
        num_bits: width of a field.
        count: fields per row.

    Returns:
        (rows, count) int64.
    """
    array: npt.NDArray[Any] = words.numpy().astype("<i4")
    place = 1 << np.arange(num_bits, dtype=np.int64)
    blocks = []
    for start in range(0, max(1, len(array)), _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(array[start : start + _ROWS_AT_ONCE])
        bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")[:, : count * num_bits]
        blocks.append(bits.reshape(len(rows), count, num_bits).astype(np.int64) @ place)
    return torch.from_numpy(np.concatenate(blocks))


def spread_groups(per_group: Tensor, num_columns: int) -> Tensor:
    """(rows, num_groups) -> (rows, num_columns): each value for the columns of its group."""
    return per_group.repeat_interleave(num_columns // per_group.shape[1], dim=1)


def compressed_weight(tensors: dict[str, Tensor], num_bits: int) -> Tensor:
    """A weight of format pack-quantized of compressed-tensors, float64 (out_features, in_features).

    ``weight = (u - z) * scale``: u dense along the input channels, z along the output channels or ``2**(bits - 1)``.
    """
    rows, columns = (int(length) for length in tensors["weight_shape"])
    unsigned = fields_of_words(tensors["weight_packed"], num_bits, columns)
    zero: Tensor | int = 1 << (num_bits - 1)
    if "weight_zero_point" in tensors:
        by_group = fields_of_words(tensors["weight_zero_point"].T.contiguous(), num_bits, rows).T
        zero = spread_groups(by_group, columns)
    return (unsigned - zero).double() * spread_groups(tensors["weight_scale"].double(), columns)


def signed_weight(tensors: dict[str, Tensor]) -> Tensor:
    """A weight of format int-quantized of compressed-tensors: int8 values under scales; float64."""
    weight = tensors["weight"].double()
    return weight * spread_groups(tensors["weight_scale"].double(), weight.shape[1])


def gptq_weight(tensors: dict[str, Tensor], num_bits: int) -> Tensor:
    """A weight of GPTQ's first format, float64 (out_features, in_features).

    qweight is packed along the input channels, down its columns; qzeros, which hold one less than the zero point, along
    the output channels; ``g_idx`` names the group of each input channel.
    """
    per_word = 32 // num_bits
    packed = tensors["qweight"]
    columns, rows = packed.shape[0] * per_word, packed.shape[1]
    codes = fields_of_words(packed.T.contiguous(), num_bits, columns)
    zeros = fields_of_words(tensors["qzeros"], num_bits, rows) + 1
    group = tensors["g_idx"].long()
    return (codes - zeros[group].T).double() * tensors["scales"].double()[group].T


def nf4_weight(tensors: dict[str, Tensor]) -> Tensor:
    """A weight as bitsandbytes stores NF4, float64: two codes a byte, the first in the upper half, absmax per block."""
    (state,) = (json.loads(bytes(it.tolist())) for name, it in tensors.items() if ".quant_state." in name)
    packed = tensors["weight"].flatten().long()
    codes = torch.stack([packed // 16, packed % 16], dim=1).flatten()
    scale = tensors["weight.absmax"].double().repeat_interleave(state["blocksize"])
    return (tensors["weight.quant_map"].double()[codes] * scale).reshape(state["shape"])
