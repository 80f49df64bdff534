"""One layer with quantized inputs on its device: the tensors, and one call of two launches, or three for few rows."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...quant.grid import dequantize
from ...types import LinearWeights, QuantizedWeight, RowRanks
from .environment import architecture, num_processors
from .factors import pack_factors
from .inputs import FusedInput, IntegerInput
from .integer import has_offset, input_group
from .launch16 import GROUP_M, OPTIONS, cdiv, kernel_group, rank_block
from .layer import TritonLinear
from .linear8 import add_parts_kernel, linear8_kernel
from .pack import PackedWeight, pack_weights, storage_bits
from .tiles import Tile, choose_tile, num_parts, tiles_of

KERNEL = "linear8"
ADDED_AT_ONCE = 1024
"""Sums that a program of ``add_parts_kernel`` makes."""
_SHORTEST_BLOCK = 32
_WEIGHTS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear8(TritonLinear):
    """weight:      codes and scales in the kernels' layout
    input:       divides, gathers, rotates, quantizes, multiplies with lora_down
    column_sums: (input groups, out_features) float32, sums of the weights; None: inputs have no offset
    lora_up:     (rank, out_features) in the inputs' type or int8, or None
    bias:        (out_features,), or None
    tiles:       by rising number of rows
    num_processors: multiprocessors of the device
    """

    weight: PackedWeight
    input: FusedInput
    column_sums: Tensor | None
    lora_up: Tensor | None
    bias: Tensor | None
    tiles: tuple[Tile, ...]
    num_processors: int

    @classmethod
    def of(cls, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> Self:
        """Repack ``weights``, for which there is no ``integer_obstacle``, on ``device``."""
        scheme = weights.activations
        has_columns = scheme is not None and has_offset(scheme)
        factors = pack_factors(weights.correction, device, dtype)
        return cls(
            weight=pack_weights(weights, device),
            input=FusedInput.of(weights, device, dtype),
            column_sums=_column_sums(weights.quantized, input_group(scheme), device) if has_columns else None,
            lora_up=None if factors is None else factors.lora_up,
            bias=None if weights.bias is None else weights.bias.to(device, dtype).contiguous(),
            tiles=tiles_of(KERNEL, architecture(device), weights.quantized.scheme.num_bits),
            num_processors=num_processors(device),
        )

    @property
    def nbytes(self) -> int:
        """See ``PreparedLinear``."""
        tensors = (self.column_sums, self.lora_up, self.bias)
        own = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return self.weight.nbytes + self.input.nbytes + own

    def _run(self, x: Tensor, row_ranks: RowRanks | None, output: Tensor) -> Tensor:
        tile = choose_tile(self.tiles, len(x))
        block_k, segment = step_lengths(tile.block_k, kernel_group(self.weight), self._input_group)
        rows = self.input.quantize_input(x, segment if self.weight.zero is not None else 0)
        num_tiles = cdiv(len(x), tile.block_m) * cdiv(self.weight.out_features, tile.block_n)
        num_blocks = cdiv(self.weight.in_features, block_k)
        parts = num_parts(tile, num_tiles, num_blocks, self.num_processors)
        if parts == 1:
            self._multiply(rows, row_ranks, output, tile, (num_tiles, 1))
            return output
        sums = output.new_empty(parts, *output.shape, dtype=torch.float32)
        self._multiply(rows, row_ranks, sums, tile, (num_tiles, parts))
        add_parts_kernel[(cdiv(output.numel(), ADDED_AT_ONCE),)](
            sums, output, output.numel(), NUM_PARTS=parts, BLOCK=ADDED_AT_ONCE, num_warps=4, **OPTIONS
        )
        return output

    def _multiply(
        self, rows: IntegerInput, row_ranks: RowRanks | None, output: Tensor, tile: Tile, grid: tuple[int, int]
    ) -> None:
        weight = self.weight
        has_rank = row_ranks is None or row_ranks.largest > 0
        linear8_kernel[grid](
            rows.codes, rows.scale, rows.offset, rows.sums, weight.words, weight.high_words, weight.scale, weight.zero,
            self.column_sums, self.bias, rows.reduced, self.lora_up if has_rank else None,
            None if row_ranks is None else row_ranks.per_row, output,
            len(rows.codes), weight.in_features, weight.out_features, rows.codes.shape[1], len(rows.scale),
            self.input.rank,
            **constants(weight.num_bits, kernel_group(weight), self._input_group, self.input.rank, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )  # fmt: skip

    @property
    def _input_group(self) -> int:
        return input_group(self.input.activations)


def step_lengths(block_k: int, group: int, input_group: int) -> tuple[int, int]:
    """BLOCK_K and SEGMENT of ``linear8_kernel``: at most ``block_k``, within groups of weights and inputs (0: none)."""
    segment = block_k
    for size in (group, input_group):
        if size:
            segment = min(segment, size & -size)
    return max(segment, _SHORTEST_BLOCK), segment


def constants(num_bits: int, group: int, input_group: int, rank: int, tile: Tile) -> dict[str, int]:
    """What ``linear8_kernel`` is compiled for."""
    block_k, segment = step_lengths(tile.block_k, group, input_group)
    return {
        "NUM_BITS": num_bits,
        "STORAGE_BITS": storage_bits(num_bits),
        "GROUP_SIZE": group,
        "INPUT_GROUP": input_group,
        "SEGMENT": segment,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": rank_block(rank),
        "GROUP_M": GROUP_M,
        "NUM_STAGES": tile.num_stages,
    }


def _column_sums(quantized: QuantizedWeight, group: int, device: torch.device) -> Tensor:
    """Sums of the weights that share an input scale, (input groups, out_features); some rows at a time."""
    group = group or quantized.in_features
    step = max(1, _WEIGHTS_AT_ONCE // quantized.in_features)
    sums = []
    for start in range(0, quantized.out_features, step):
        part = quantized.rows(slice(start, start + step))
        zero_point = None if part.zero_point is None else part.zero_point.to(device)
        part = QuantizedWeight(part.codes.to(device), part.scale.to(device), zero_point, part.scheme)
        weight = dequantize(part)
        sums.append(weight.view(len(weight), -1, group).sum(-1).T)
    return torch.cat(sums, 1).contiguous()
