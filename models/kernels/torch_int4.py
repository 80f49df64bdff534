"""INT4 weights in bfloat16 on the CPU, through the weight-only int4 product that torch itself ships.

Replaces: unpacking the whole weight for every token, which is what makes the reference backend slow in decode.

torch packs two codes per byte in tiles of output rows, and multiplies with dequantization in registers, float32
accumulation. Its grid is ``weight = (code - 8) * scale + zero``, so ``zero = (8 - zero_point) * scale``.
Cost: it takes scale and zero in bfloat16 only. Each of the two roundings moves a weight by ``2**-8 * 8 * scale`` at
most, together an eighth of the half-step that INT4 itself may cost. On the weights of a trained network it comes to
0.2 % of the weight's norm where INT4 in groups of 64 costs 9.6 %: the sum of both is the same to four digits. MXINT4,
whose scales are powers of two and whose zeros are none, loses nothing.

The product is one row at a time: fastest for a few rows, slower than a dense matrix product beyond about fifty. Many
rows are therefore multiplied with the dequantized weight, some tiles at a time so that the transient stays small. Codes
are stored once: the tiles are unpacked from torch's own layout. That layout depends on the instruction set, so a probe
finds out which one it is; should none fit, torch's product takes all rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import LinearWeights, QuantizedWeight, RowRanks
from .base import LinearSpec, PreparedLinear
from .dense_terms import DenseTerms

_UNIFORM_FORMATS = frozenset(("int", "mxint"))
_GROUP_SIZES = (256, 128, 64, 32)
_ROW_MULTIPLE = 16
_FEW_ROWS = 48
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class _TileLayout:
    """Order of torch's packed bytes: (tiles, in_features, num_rows / 2), low nibble first.

    is_split: the nibbles of byte j are rows j and j + num_rows / 2 of the tile; otherwise rows 2j and 2j + 1
    """

    num_rows: int
    is_split: bool

    def unpack(self, packed: Tensor) -> Tensor:
        """``packed`` (n, in_features / 2) with n whole tiles -> codes (in_features, n) uint8."""
        num_rows, in_features = packed.shape[0], packed.shape[1] * 2
        tiles = packed.view(-1, in_features, self.num_rows // 2)
        codes = torch.stack((tiles & 15, tiles >> 4), 2 if self.is_split else 3)
        return codes.transpose(0, 1).reshape(in_features, num_rows)


_LAYOUTS = (_TileLayout(64, is_split=True), _TileLayout(32, is_split=True), _TileLayout(32, is_split=False))


@dataclass(frozen=True, slots=True)
class _Int4Linear:
    """packed:            (out_features, in_features / 2) uint8 in torch's tiles
    scales_and_zeros:     (in_features / op_group, out_features, 2) bfloat16
    zero_point:           (num_groups, out_features) int8
    layout:               how to unpack ``packed``; None when unknown
    """

    packed: Tensor
    scales_and_zeros: Tensor
    zero_point: Tensor
    layout: _TileLayout | None
    terms: DenseTerms

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes + self.zero_point.nbytes + self.terms.nbytes

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        x = self.terms.prepare_input(x)
        if self.layout is None or x.shape[0] <= _FEW_ROWS:
            op_group = x.shape[1] // self.scales_and_zeros.shape[0]
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self.packed, op_group, self.scales_and_zeros
            )
        else:
            product = self._multiply_dequantized(x, self.layout)
        return self.terms.add_to(product, x, row_ranks)

    def _multiply_dequantized(self, x: Tensor, layout: _TileLayout) -> Tensor:
        out_features, in_features = self.packed.shape[0], x.shape[1]
        product = x.new_empty(x.shape[0], out_features)
        tiles_at_once = max(1, _WEIGHTS_AT_ONCE // (layout.num_rows * in_features))
        step = tiles_at_once * layout.num_rows
        for start in range(0, out_features, step):
            columns = slice(start, start + step)
            torch.mm(x, self._dequantize(columns, layout), out=product[:, columns])
        return product

    def _dequantize(self, columns: slice, layout: _TileLayout) -> Tensor:
        """Rows ``columns`` of the weight, transposed: (in_features, n) bfloat16."""
        codes = layout.unpack(self.packed[columns])
        zero_point = self.zero_point[:, columns]
        groups = codes.view(torch.int8).view(zero_point.shape[0], -1, codes.shape[1])
        scale = self.scales_and_zeros[:: self.scales_and_zeros.shape[0] // zero_point.shape[0], columns, 0].contiguous()
        weight = groups.sub_(zero_point[:, None]).to(torch.bfloat16).mul_(scale[:, None])
        return weight.view(codes.shape)


class TorchInt4Backend:
    """torch's int4 product: CPU, bfloat16, INT4 and MXINT4 with scales shared by a multiple of 32 channels."""

    name = "torch-int4"

    def unsupported(self, spec: LinearSpec) -> str | None:
        """The first condition that ``spec`` does not meet."""
        return next(_obstacles(spec), None)

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Repack the codes into torch's tiles and the grid into its scales and zeros."""
        quantized = weights.quantized
        return _Int4Linear(
            packed=_pack(quantized.codes),
            scales_and_zeros=_scales_and_zeros(quantized),
            zero_point=_zero_point(quantized).to(torch.int8).T.contiguous(),
            layout=_probe_layout(quantized.out_features),
            terms=DenseTerms.of(weights, device, dtype),
        )


def _obstacles(spec: LinearSpec) -> Iterator[str]:
    if spec.device.type != "cpu":
        yield f"runs on the CPU only, not on {spec.device.type}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        yield f"torch {torch.__version__} has no int4 product for the CPU"
    if spec.dtype != torch.bfloat16:
        yield f"runs in bfloat16 only, not in {str(spec.dtype).removeprefix('torch.')}"
    if spec.scheme.num_bits != 4:
        yield f"takes 4-bit codes, not {spec.scheme.num_bits}-bit ones"
    if spec.scheme.format not in _UNIFORM_FORMATS:
        yield f"takes codes in uniform steps (int, mxint), not {spec.scheme.format}"
    group_length = spec.scheme.group_length(spec.in_features)
    if _op_group(group_length) is None:
        yield f"scales must be shared by a multiple of 32 input channels, not by {group_length}"
    if spec.out_features % _ROW_MULTIPLE:
        yield f"out_features must be a multiple of {_ROW_MULTIPLE}, not {spec.out_features}"


def _op_group(group_length: int) -> int | None:
    """Largest group size of torch's product that tiles ``group_length``, over which the scale is then repeated."""
    return next((size for size in _GROUP_SIZES if group_length % size == 0), None)


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def _zero_point(quantized: QuantizedWeight) -> Tensor:
    """(out_features, num_groups) uint8, also when symmetric."""
    if quantized.zero_point is None:
        return torch.full_like(quantized.scale, 8, dtype=torch.uint8)
    return quantized.zero_point


def _scales_and_zeros(quantized: QuantizedWeight) -> Tensor:
    scale = quantized.scale.to(torch.bfloat16)
    # from the rounded scale: a zero point then cancels its code as exactly as bfloat16 allows
    zero = ((8 - _zero_point(quantized).float()) * scale.float()).to(torch.bfloat16)
    grid = torch.stack((scale, zero), -1).transpose(0, 1)
    group_length = quantized.scheme.group_length(quantized.in_features)
    return grid.repeat_interleave(group_length // (_op_group(group_length) or group_length), 0).contiguous()


def _probe_layout(out_features: int) -> _TileLayout | None:
    """The layout in which this build of torch packs tiles on this processor; None when it is none of the known."""
    codes = torch.randint(16, (128, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = _pack(codes)
    for layout in _LAYOUTS:
        if out_features % layout.num_rows == 0 and torch.equal(layout.unpack(packed), codes.T):
            return layout
    return None
