"""Codes of 2 to 8 bits as one dense little-endian bit stream per row.

Code ``i`` of a row occupies bits ``i * num_bits`` to ``(i + 1) * num_bits - 1`` of that row's stream, bit 0 being the
lowest bit of the first byte; a row is padded with zero bits to a whole byte. Eight codes of any width fill
``num_bits`` bytes exactly, so both directions work on words of eight codes in int64 lanes: no width is a special
case, whether or not its codes straddle bytes. 2 and 4 bits never straddle and skip the words, 8 bits is a copy.
Wider integers are read as bytes in the processor's order: little-endian, as all that torch runs on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SchemeError

_CODES_PER_WORD = 8
_WORD_BYTES = 8
_DTYPE_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    word = lanes[..., 0].to(torch.uint8 if per_word < _CODES_PER_WORD else torch.int64)
    for lane in range(1, per_word):
        word = word | (lanes[..., lane].to(word.dtype) << (lane * num_bits))
    num_bytes = per_word * num_bits // 8
    stream = word.contiguous().view(torch.uint8).view(*word.shape, -1)[..., :num_bytes]
    return stream.flatten(1)[:, : packed_columns(codes.shape[1], num_bits)].contiguous()


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
    if 8 % num_bits == 0:
        codes = _spread(packed, num_bits, 8 // num_bits)
    else:
        lanes = _lanes(packed, num_bits)  # eight codes are num_bits bytes
        word = torch.zeros(*lanes.shape[:2], _WORD_BYTES, dtype=torch.uint8, device=packed.device)
        word[..., :num_bits] = lanes
        codes = _spread(word.view(torch.int64).squeeze(-1), num_bits, _CODES_PER_WORD)
    return codes[:, :num_columns].contiguous()


def _check_matrix(values: Tensor, num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise SchemeError(f"num_bits is {num_bits}; choose 2 to 8")
    if values.dtype != torch.uint8 or values.dim() != 2:
        raise SchemeError(f"codes are a uint8 matrix, not {values.dtype} of shape {tuple(values.shape)}")


def _lanes(values: Tensor, per_word: int) -> Tensor:
    """(rows, columns) -> (rows, words, per_word), the last word filled up with zeros."""
    missing = -values.shape[1] % per_word
    padded = F.pad(values, (0, missing)) if missing else values
    return padded.reshape(values.shape[0], padded.shape[1] // per_word, per_word)


def _spread(word: Tensor, num_bits: int, num_fields: int) -> Tensor:
    """(rows, words) -> (rows, words * num_fields) uint8: the fields of ``num_bits`` of every word, lowest first.

    Each word becomes a wider one with a byte per field, which is then read as bytes: whole-tensor operations only,
    where writing field by field would stride through memory (20 times slower). Every round moves the upper half of
    all groups of fields away from the lower half.
    """
    spread = word.to(_DTYPE_OF_BYTES[num_fields])
    together = num_fields
    while together > 1:
        together //= 2
        lower = _repeated((1 << together * num_bits) - 1, 16 * together, num_fields)
        stays = spread & lower
        spread = (spread << together * (8 - num_bits)).bitwise_and_(lower << 8 * together).bitwise_or_(stays)
    return spread.view(torch.uint8)


def _repeated(value: int, distance: int, num_bytes: int) -> int:
    """``value`` every ``distance`` bits of ``num_bytes`` bytes; its sign bit stays clear."""
    return sum(value << at for at in range(0, 8 * num_bytes, distance))
