"""Weights in the kernels' own layout: repacked once, into memory of their own.

The layout is described in ``csrc/qerve_cpu.h``. One float16 scale serves a whole group of input channels, and integer
sums run over blocks of 64 channels, or of 32 where a group is no multiple of 64: a block never crosses a group.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...types import LinearWeights, QuantizedWeight
from .factors import RANK_BLOCK, ByteCodes, ByteFactors, byte_factors, to_bytes
from .runtime import Runtime
from .structs import STRIP_ROWS, Matrix, Source

WIDE_BLOCK = 64
NARROW_BLOCK = 32
_BYTE_BITS = 8
_SCALE_BYTES = 2
_STORAGE_BITS = (2, 4, 8)
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrix:
    """A weight in uniform steps: ``scale * (code - zero_point)``.

    codes:      (out_features, in_features) uint8; or the artifact's dense rows of bits (``quant.packing``), which need
        not be unpacked first: (out_features, in_features * num_bits / 8)
    scale:      (out_features, num_groups), any floating point
    zero_point: (out_features, num_groups) uint8; None: the middle code
    """

    codes: Tensor
    in_features: int
    num_bits: int
    scale: Tensor
    zero_point: Tensor | None = None

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> "CodedMatrix":
        """The weight of a layer."""
        return cls(
            quantized.codes,
            quantized.in_features,
            quantized.scheme.num_bits,
            quantized.scale,
            quantized.zero_point,
        )

    @classmethod
    def of_bytes(cls, values: ByteCodes) -> "CodedMatrix":
        """Codes of 8 bits around 128."""
        return cls(values.codes, values.codes.shape[1], _BYTE_BITS, values.scale)

    @property
    def code_bits(self) -> int:
        """Bits from one code to the next: 8 where each has a byte of its own."""
        return self.codes.shape[1] * _BYTE_BITS // self.in_features

    @property
    def storage_bits(self) -> int:
        """Bits that the kernels keep a code in."""
        return next(bits for bits in _STORAGE_BITS if bits >= self.num_bits)


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """One weight in the kernels' layout, with its low-rank term.

    struct: ``qerve_matrix``; its pointers lead into the tensors here, which live as long as this object
    strips: uint8, starts on a cache line
    bias:   (out_features,) float32
    """

    struct: Matrix
    strips: Tensor
    bias: Tensor | None
    down: "PackedMatrix | None"

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.struct.out_features)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.struct.in_features)

    @property
    def block(self) -> int:
        """Input channels per integer sum."""
        return int(self.struct.block)

    @property
    def num_rank_blocks(self) -> int:
        """Blocks of 32 components at the end of each strip."""
        return -(-int(self.struct.rank) // RANK_BLOCK)

    @property
    def address(self) -> int:
        """Where the structure lies."""
        return ctypes.addressof(self.struct)

    def narrowed(self, block: int) -> "PackedMatrix":
        """The same memory read in blocks of ``block`` channels, its own or narrower."""
        struct = Matrix.from_buffer_copy(self.struct)
        _narrow(struct, block)
        down = None if self.down is None else self.down.narrowed(block)
        struct.down = None if down is None else down.address
        return PackedMatrix(struct, self.strips, self.bias, down)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight keeps resident."""
        parts = (self.strips, self.bias, self.down)
        return sum(part.nbytes for part in parts if part is not None)


def widest_block(*lengths: int) -> int | None:
    """The widest block that crosses no boundary of groups of these ``lengths``; None: there is none."""
    common = math.gcd(*lengths)
    return next((block for block in (WIDE_BLOCK, NARROW_BLOCK) if common % block == 0), None)


def pack_linear(runtime: Runtime, weights: LinearWeights, block: int) -> PackedMatrix:
    """Codes, correction and bias of ``weights`` packed for sums over ``block`` channels.

    Raises:
        KernelError: the kernels cannot hold this weight.
    """
    correction = weights.correction
    factors = byte_factors(correction, block) if correction is not None and correction.rank else None
    return pack_matrix(runtime, CodedMatrix.of(weights.quantized), block, factors, weights.bias)


def pack_dense(runtime: Runtime, weight: Tensor) -> PackedMatrix:
    """``weight`` (out_features, in_features) rounded to 8 bits, with one scale per row and block of channels.

    Raises:
        KernelError: the kernels cannot hold this weight.
    """
    block = _dense_block(weight.shape[1])
    chunks = [to_bytes(rows, block) for rows in torch.split(weight, max(1, _ELEMENTS_AT_ONCE // weight.shape[1]))]
    values = ByteCodes(torch.cat([chunk.codes for chunk in chunks]), torch.cat([chunk.scale for chunk in chunks]))
    return pack_matrix(runtime, CodedMatrix.of_bytes(values), block)


def dense_nbytes(out_features: int, in_features: int) -> int:
    """Bytes that ``pack_dense`` makes of a weight of this shape."""
    block = _dense_block(in_features)
    num_strips = -(-out_features // STRIP_ROWS)
    return num_strips * (in_features // block) * STRIP_ROWS * (_SCALE_BYTES + block)


def _dense_block(in_features: int) -> int:
    return widest_block(in_features) or NARROW_BLOCK


def pack_matrix(
    runtime: Runtime, coded: CodedMatrix, block: int, factors: ByteFactors | None = None, bias: Tensor | None = None
) -> PackedMatrix:
    """``coded`` with ``factors`` and ``bias`` (out_features,) in the kernels' layout.

    Args:
        runtime: the kernels.
        coded: the weight; ``block`` divides its groups.
        block: 32 or 64, input channels per integer sum.
        factors: low-rank term.
        bias: added to the outputs.

    Raises:
        KernelError: the kernels cannot hold this weight.
    """
    scales = coded.scale.float().contiguous()
    up_scales = None if factors is None else factors.lora_up.scale.contiguous()
    source = _source(coded, scales, factors, up_scales)
    matrix = Matrix(
        storage_bits=coded.storage_bits,
        zero=0 if coded.zero_point is not None else 1 << (coded.num_bits - 1),
        rank=0 if factors is None else factors.rank,
    )
    strips = runtime.memory.take(runtime.plan(source, matrix))
    _narrow(matrix, block)
    matrix.strips = strips.data_ptr()
    runtime.pack(source, matrix)
    down = None
    if factors is not None and factors.lora_down is not None:
        down = pack_matrix(runtime, CodedMatrix.of_bytes(factors.lora_down), block)
        matrix.down = down.address
    if bias is not None:
        bias = bias.float().contiguous()
        matrix.bias = bias.data_ptr()
    return PackedMatrix(matrix, strips, bias, down)


def _source(coded: CodedMatrix, scales: Tensor, factors: ByteFactors | None, up_scales: Tensor | None) -> Source:
    """Addresses in the tensors given, which must outlive the packing."""
    return Source(
        codes=_address(coded.codes),
        scales=scales.data_ptr(),
        zero_points=None if coded.zero_point is None else _address(coded.zero_point),
        out_features=coded.codes.shape[0],
        in_features=coded.in_features,
        code_bits=coded.code_bits,
        group_size=coded.in_features // scales.shape[1],
        up_codes=None if factors is None else _address(factors.lora_up.codes),
        up_scales=None if up_scales is None else up_scales.data_ptr(),
    )


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError("the kernels read contiguous tensors only")
    return tensor.data_ptr()


def _narrow(matrix: Matrix, block: int) -> None:
    """Read a matrix planned for blocks of 64 channels in blocks of 32: the bytes are the same in both."""
    if matrix.block != block:
        matrix.blocks_per_group = matrix.blocks_per_group * matrix.block // block
        matrix.block = block
