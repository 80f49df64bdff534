"""Codes of 2 to 8 bits as one dense little-endian bit stream per row.

Code ``i`` of a row occupies bits ``i * num_bits`` to ``(i + 1) * num_bits - 1`` of that row's stream, bit 0 being the
lowest bit of the first byte; a row is padded with zero bits to a whole byte. Eight codes of any width fill
``num_bits`` bytes exactly, so both directions work on words of eight codes in int64 lanes: no width is a special
case, whether or not its codes straddle bytes. 2 and 4 bits never straddle and skip the words, 8 bits is a copy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SchemeError

_CODES_PER_WORD = 8


def packed_columns(num_columns: int, num_bits: int) -> int:
    """Bytes of one packed row of ``num_columns`` codes."""
    return -(-num_columns * num_bits // 8)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """(rows, columns) uint8 codes -> (rows, ``packed_columns``) uint8.

    Raises:
        SchemeError: not a uint8 matrix, ``num_bits`` outside 2..8, or a code that does not fit in ``num_bits``.
    """
    _check_matrix(codes, num_bits)
    if codes.numel() and int(codes.max()) >> num_bits:
        raise SchemeError(f"a code of {int(codes.max())} does not fit in {num_bits} bits")
    if num_bits == 8:
        return codes.clone()
    per_word = 8 // num_bits if 8 % num_bits == 0 else _CODES_PER_WORD
    lanes = _lanes(codes, per_word)
    word = lanes[..., 0].to(_word_dtype(num_bits))
    for lane in range(1, per_word):
        word = word | (lanes[..., lane].to(word.dtype) << (lane * num_bits))
    return _split(word, 8, per_word * num_bits // 8, packed_columns(codes.shape[1], num_bits))


def unpack(packed: Tensor, num_bits: int, num_columns: int) -> Tensor:
    """(rows, ``packed_columns``) uint8 -> (rows, ``num_columns``) uint8 codes; padding bits are ignored.

    Raises:
        SchemeError: not a uint8 matrix, ``num_bits`` outside 2..8, or a row length that is not ``packed_columns``.
    """
    _check_matrix(packed, num_bits)
    expected = packed_columns(num_columns, num_bits)
    if packed.shape[1] != expected:
        raise SchemeError(
            f"rows of {packed.shape[1]} bytes do not hold {num_columns} codes of {num_bits} bits: expected {expected}"
        )
    if num_bits == 8:
        return packed.clone()
    codes_per_word = 8 // num_bits if 8 % num_bits == 0 else _CODES_PER_WORD
    bytes_per_word = codes_per_word * num_bits // 8
    lanes = _lanes(packed, bytes_per_word)
    word = lanes[..., 0].to(_word_dtype(num_bits))
    for lane in range(1, bytes_per_word):
        word = word | (lanes[..., lane].to(word.dtype) << (lane * 8))
    return _split(word, num_bits, codes_per_word, num_columns)


def _check_matrix(values: Tensor, num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise SchemeError(f"num_bits is {num_bits}; choose 2 to 8")
    if values.dtype != torch.uint8 or values.dim() != 2:
        raise SchemeError(f"codes are a uint8 matrix, not {values.dtype} of shape {tuple(values.shape)}")


def _word_dtype(num_bits: int) -> torch.dtype:
    return torch.uint8 if 8 % num_bits == 0 else torch.int64


def _lanes(values: Tensor, per_word: int) -> Tensor:
    """(rows, columns) -> (rows, words, per_word), the last word filled up with zeros."""
    missing = -values.shape[1] % per_word
    padded = F.pad(values, (0, missing)) if missing else values
    return padded.reshape(values.shape[0], padded.shape[1] // per_word, per_word)


def _split(word: Tensor, num_bits: int, num_fields: int, num_columns: int) -> Tensor:
    """(rows, words) -> (rows, num_columns) uint8: the lowest ``num_fields`` fields of ``num_bits`` of every word."""
    fields = torch.empty((*word.shape, num_fields), dtype=torch.uint8, device=word.device)
    for field in range(num_fields):
        fields[..., field] = (word >> (field * num_bits)) & ((1 << num_bits) - 1)
    return fields.flatten(1)[:, :num_columns].contiguous()
