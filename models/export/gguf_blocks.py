"""Codes as GGUF's blocks of 32 weights: exact wherever a block type spans the integers that scales multiply.

    q4_0  fp16 d, 16 bytes of codes; element i in the lower half of byte i, i + 16 in the upper: d * (q - 8)
    q4_1  fp16 d, fp16 m, codes as q4_0: d * q + m
    q5_0  fp16 d, 32 high bits (element i at bit i), lower halves as q4_0: d * (q - 16)
    q8_0  fp16 d, 32 int8: d * q

An artifact's weight is ``scale * (code - zero)``, with groups of a multiple of 32: every block repeats its group's
scale, and the signed difference is a code. An asymmetric 4-bit weight has differences of -15 to 15 and fits q5_0; q4_1
keeps its 4 bits, but rounds ``-scale * zero`` to fp16.
Source: ggml's block definitions, as the ``gguf`` package dequantizes them.
"""

from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ..scheme import QuantScheme
from ..types import QuantizedWeight

Bytes = npt.NDArray[np.uint8]
BLOCK = 32

KINDS: dict[str, Kind] = {"q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1, "q5_0": Kind.Q5_0, "q8_0": Kind.Q8_0, "f16": Kind.F16}
_SPANS = {Kind.Q4_0: (-8, 7), Kind.Q5_0: (-16, 15), Kind.Q8_0: (-128, 127)}
"""Signed integers that each type holds, smallest type first."""

WeightKind = Literal["auto", "q4_0", "q4_1", "q5_0", "q8_0", "f16"]


def signed_span(scheme: QuantScheme) -> tuple[int, int]:
    """Least and largest ``code - zero`` of a scheme of integers."""
    middle = 1 << (scheme.num_bits - 1)
    return (-middle, middle - 1) if scheme.is_symmetric else (-scheme.max_code, scheme.max_code)


def holds_exactly(kind: Kind, scheme: QuantScheme, in_features: int) -> bool:
    """Whether blocks of ``kind`` say exactly what codes of ``scheme`` say (but for scales beyond float16)."""
    if scheme.format not in ("int", "mxint") or scheme.group_length(in_features) % BLOCK:
        return False
    if kind == Kind.Q4_1:
        return scheme.is_symmetric and scheme.num_bits <= 4
    least, largest = signed_span(scheme)
    span = _SPANS.get(kind)
    return span is not None and span[0] <= least and largest <= span[1]


def smallest_exact(scheme: QuantScheme, in_features: int) -> Kind | None:
    """The smallest type that holds codes of ``scheme`` exactly; None: none does."""
    return next((kind for kind in _SPANS if holds_exactly(kind, scheme, in_features)), None)


def code_blocks(quantized: QuantizedWeight, kind: Kind) -> Bytes:
    """Blocks of ``kind`` with the very codes of ``quantized``: (out_features, bytes of a row).

    ``kind`` holds them exactly, or is q4_1 with codes of at most 4 bits.
    """
    rows, columns = quantized.codes.shape
    scheme = quantized.scheme
    group_length = scheme.group_length(columns)

    def per_block(values: Tensor) -> Tensor:
        return values.repeat_interleave(group_length // BLOCK, dim=1).reshape(-1, 1)

    zero = quantized.zero_point
    if zero is None:
        zero = torch.full(quantized.scale.shape, 1 << (scheme.num_bits - 1), dtype=torch.uint8)
    codes = quantized.codes.reshape(-1, BLOCK).to(torch.int16)
    scale, zero_of_block = per_block(quantized.scale.float()), per_block(zero.to(torch.int16))
    if kind == Kind.Q4_1:
        low = -(scale * zero_of_block)
        parts = [_half(scale), _half(low), _nibbles(codes)]
    else:
        offset = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 0}[kind]
        parts = [_half(scale), *_codes(codes - zero_of_block + offset, kind)]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def nearest_blocks(weight: Tensor, kind: Kind) -> npt.NDArray[Any]:
    """``weight`` (out_features, in_features) rounded to ``kind`` as llama.cpp does it."""
    blocks: npt.NDArray[Any] = gguf.quantize(weight.float().contiguous().numpy(), kind)
    return blocks


def _codes(codes: Tensor, kind: Kind) -> list[Bytes]:
    if kind == Kind.Q8_0:
        return [codes.to(torch.int8).numpy().view(np.uint8)]
    if kind == Kind.Q4_0:
        return [_nibbles(codes)]
    high = np.packbits((codes >> 4).to(torch.uint8).numpy(), axis=1, bitorder="little")
    return [high, _nibbles(codes & 15)]


def _nibbles(codes: Tensor) -> Bytes:
    packed: Bytes = (codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4).to(torch.uint8).numpy()
    return packed


def _half(values: Tensor) -> Bytes:
    return values.to(torch.float16).contiguous().numpy().view(np.uint8)
