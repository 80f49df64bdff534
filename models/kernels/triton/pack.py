"""Layout of a quantized weight as the Triton kernels read it, made once at load on the device itself.

The kernels take tiles of (BLOCK_K input channels, BLOCK_N output channels). Codes therefore lie K-major: neighbouring
output channels are neighbours in memory, so that a warp reads whole lines whatever the number of bits.

    words[k // per_word, n]   int32, per_word = 32 // storage_bits; channel k from bit storage_bits * (k % per_word) on
    scale[g, n], zero[g, n]   g = k // group_size

A code takes 2, 4 or 8 bits: 5 to 7 bit codes are stored in 8. 3-bit codes are two planes, the two low bits in ``words``
(as 2-bit codes) and the high bit in ``high_words`` (per_word = 32): three bits each, and neither plane straddles words.
Rows are padded to a multiple of 32 input channels with codes that stand for zero.

Zero points become numbers of steps in the scale's type, which holds 0..255 exactly. Powers of two (MXINT, MXFP4) are
bfloat16 as in ``QuantizedWeight``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant import grid
from ...quant.packing import pack, unpack
from ...types import LinearWeights, QuantizedWeight

CHANNEL_MULTIPLE = 32
"""Input channels to whose multiple a row is padded: a whole word of every plane."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One weight matrix in the kernels' layout.

    words:      (padded_features // per_word, out_features) int32
    high_words: (padded_features // 32, out_features) int32, the high bits of 3-bit codes; else None
    scale:      (num_groups, out_features) float16 or bfloat16
    zero:       (num_groups, out_features), the scale's type, in steps; None: ``middle``, or a table
    table:      (16,) float32, what the codes of ``mxfp4`` and ``nf4`` stand for; None: the codes themselves
    num_bits:   of a code, 2..8
    group_size: input channels that share a scale; all of them where there is one per output channel
    """

    words: Tensor
    high_words: Tensor | None
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    num_bits: int
    group_size: int
    in_features: int
    out_features: int

    @property
    def storage_bits(self) -> int:
        """Bits of one code in ``words``: 2, 4 or 8."""
        return storage_bits(self.num_bits)

    @property
    def per_word(self) -> int:
        """Codes in one of ``words``."""
        return 32 // self.storage_bits

    @property
    def middle(self) -> int:
        """Code that stands for zero where there are neither zeros nor a table."""
        return 1 << (self.num_bits - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.words, self.high_words, self.scale, self.zero, self.table)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def codes(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Codes of output channels ``rows``, a slice or indices (n,): (n, in_features) uint8."""
        codes = _unpacked(self.words[:, rows], self.storage_bits)
        if self.high_words is not None:
            codes |= _unpacked_bits(self.high_words[:, rows]) << 2
        return codes[:, : self.in_features]

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """What the codes of output channels ``rows``, a slice or indices (n,), stand for: (n, in_features) float32."""
        codes = self.codes(rows)
        values = codes.float() if self.table is None else self.table[codes.long()]
        groups = values.view(len(codes), self.scale.shape[0], self.group_size)
        if self.zero is not None:
            groups -= self.zero[:, rows].T[:, :, None].float()
        elif self.table is None:
            groups -= self.middle
        return (groups * self.scale[:, rows].T[:, :, None].float()).flatten(1)


def storage_bits(num_bits: int) -> int:
    """Bits that the words take for a code of ``num_bits``: 2, 4 or 8; of a 3-bit code 2, its high bit lies apart."""
    return 2 if num_bits <= 3 else 4 if num_bits == 4 else 8


def pack_weights(weights: LinearWeights, device: torch.device) -> PackedWeight:
    """Codes, scales and zero points of ``weights`` in the kernels' layout on ``device``, repacked there.

    Factors, input transform and bias are not part of it.
    """
    return pack_quantized(weights.quantized, device)


def pack_quantized(quantized: QuantizedWeight, device: torch.device) -> PackedWeight:
    """As ``pack_weights``, for a weight on its own: a head, a factor."""
    scheme = quantized.scheme
    codes = _padded(quantized).to(device)
    words, high_words = codes, None
    if scheme.num_bits == 3:
        words, high_words = codes & 3, _packed_bits(codes >> 2)
    zero = None if quantized.zero_point is None else quantized.zero_point.to(device, quantized.scale.dtype)
    table = None
    if scheme.format in {"mxfp4", "nf4"}:
        numbers, one = torch.arange(16, dtype=torch.uint8), torch.ones(1)
        table = grid.decode(numbers, one, None, scheme).to(device)
    return PackedWeight(
        words=_packed(words, storage_bits(scheme.num_bits)),
        high_words=high_words,
        scale=quantized.scale.to(device).T.contiguous(),
        zero=None if zero is None else zero.T.contiguous(),
        table=table,
        num_bits=scheme.num_bits,
        group_size=scheme.group_length(quantized.in_features),
        in_features=quantized.in_features,
        out_features=quantized.out_features,
    )


def _padded(quantized: QuantizedWeight) -> Tensor:
    """Codes (out_features, padded_features); the padding stands for zero on the grid of each row's last group."""
    codes, scheme = quantized.codes, quantized.scheme
    missing = -codes.shape[1] % CHANNEL_MULTIPLE
    if not missing:
        return codes
    if quantized.zero_point is not None:
        return torch.cat((codes, quantized.zero_point[:, -1:].expand(-1, missing)), 1)
    zero = {"mxfp4": 0, "nf4": 7}.get(scheme.format, 1 << (scheme.num_bits - 1))
    return F.pad(codes, (0, missing), value=zero)


def _packed(codes: Tensor, num_bits: int) -> Tensor:
    return pack(codes, num_bits).view(torch.int32).T.contiguous()


def _unpacked(words: Tensor, num_bits: int) -> Tensor:
    """(rows of words, n) int32 -> (n, padded_features) uint8."""
    rows = _transposed(words).view(torch.uint8)
    return unpack(rows, num_bits, rows.shape[1] * 8 // num_bits)


def _packed_bits(bits: Tensor) -> Tensor:
    """(n, padded_features) of 0 and 1 -> (padded_features / 32, n) int32."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
    packed = (bits.view(len(bits), -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32).T.contiguous()


def _unpacked_bits(words: Tensor) -> Tensor:
    """(padded_features / 32, n) int32 -> (n, padded_features) uint8 of 0 and 1."""
    packed = _transposed(words).view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((packed[:, :, None] >> places) & 1).flatten(1)


def _transposed(words: Tensor) -> Tensor:
    # a dimension of length 1 passes for contiguous with any stride, and then cannot be viewed as bytes
    return words.T.clone(memory_format=torch.contiguous_format)
