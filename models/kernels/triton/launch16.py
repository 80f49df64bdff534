"""Which kernels of ``linear16`` run for how many rows, with which tiles.

A launch allocates from torch's cache only, asks the device nothing and copies nothing from the host: it can be captured
into a CUDA graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from types import MappingProxyType

import torch
from torch import Tensor

from . import linear16
from .pack import PackedWeight
from .tiles import Tile, num_parts

GROUP_M = 8
"""Tiles of rows that take turns at a tile of the weight."""
MAX_DOWN_PARTS = 4
"""Parts of the down-projection that ``tiled_kernel`` adds up: each is read again by every column of tiles."""
REDUCE_ROWS = 16
SMALL_WARPS, SMALL_STAGES = 4, 3
"""Of ``reduce_kernel`` and ``prepare_kernel``, which the table of tiles does not name."""
OPTIONS: Mapping[str, bool] = MappingProxyType({"enable_fp_fusion": True})
"""Triton warns that its default will change."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearArguments:
    """One call: tensors as ``layer16.TritonLinear16`` describes them, or None.

    x: (num_rows, in_features) contiguous; output: (num_rows, out_features), to be written
    row_ranks: (num_rows,) int64: components that count in each row; None: all in every row
    """

    x: Tensor
    output: Tensor
    weight: PackedWeight
    input_scale: Tensor | None
    channel_order: Tensor | None
    bias: Tensor | None
    lora_up: Tensor | None
    lora_down: Tensor | None
    component_scale: Tensor | None
    row_ranks: Tensor | None

    @property
    def rank(self) -> int:
        """Components of the low-rank term; 0: there is none."""
        return 0 if self.lora_up is None else self.lora_up.shape[0]

    @property
    def down_rank(self) -> int:
        """Rows of ``lora_down``; 0: there is none."""
        return 0 if self.lora_down is None else self.rank


def launch(arguments: LinearArguments, tile: Tile, num_processors: int) -> None:
    """Fill ``arguments.output``.

    Args:
        arguments: tensors on the current device.
        tile: takes as many rows.
        num_processors: multiprocessors of the device, to which the work is divided.
    """
    weight = arguments.weight
    num_tiles = cdiv(len(arguments.x), tile.block_m) * cdiv(weight.out_features, tile.block_n)
    num_blocks = cdiv(weight.in_features, fitting_block(tile.block_k, kernel_group(weight)))
    parts = num_parts(tile, num_tiles, num_blocks, num_processors)
    if tile.block_m == 1 or (tile.max_split > 1 and (parts > 1 or arguments.lora_down is not None)):
        _launch_split(arguments, tile, parts)
    else:
        _launch_tiled(arguments, tile, num_processors)


def kernel_group(weight: PackedWeight) -> int:
    """``GROUP_SIZE`` of the kernels: 0 where an output channel has one scale."""
    return 0 if weight.group_size == weight.in_features else weight.group_size


def fitting_block(block_k: int, group: int) -> int:
    """The tile of input channels nearest to ``block_k`` that divides ``group`` or is divided by it."""
    is_fitting = group == 0 or group % block_k == 0 or block_k % group == 0
    return block_k if is_fitting else gcd(block_k, group)


def rank_block(rank: int) -> int:
    """Components in a tile: a power of two from 16, what a tensor core takes, to 64."""
    return min(64, max(16, 1 << (rank - 1).bit_length())) if rank else 16


def format_constants(num_bits: int, storage_bits: int, group: int, block_k: int) -> dict[str, int]:
    """What a kernel is compiled for, of a weight's format."""
    return {"NUM_BITS": num_bits, "STORAGE_BITS": storage_bits, "GROUP_SIZE": group, "BLOCK_K": block_k}


def block_constants(tile: Tile, rank: int) -> dict[str, int]:
    """What a kernel is compiled for, of a tile."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_R": rank_block(rank),
        "NUM_STAGES": tile.num_stages,
    }


def reduce_constants(tile: Tile, parts: int, rank: int) -> dict[str, int]:
    """What ``reduce_kernel`` is compiled for."""
    is_row = tile.block_m == 1
    return {
        "SPLIT": parts,
        "BLOCK_M": 1 if is_row else REDUCE_ROWS,
        "BLOCK_N": 128 if is_row else 32,
        "BLOCK_R": rank_block(rank),
    }


def prepare_constants(rank: int) -> dict[str, int]:
    """What ``prepare_kernel`` is compiled for."""
    return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": rank_block(rank), "NUM_STAGES": SMALL_STAGES}


def cdiv(length: int, block: int) -> int:
    """Blocks that ``length`` takes."""
    return -(-length // block)


def _constants(arguments: LinearArguments, tile: Tile) -> dict[str, int]:
    weight = arguments.weight
    group = kernel_group(weight)
    block_k = fitting_block(tile.block_k, group)
    return format_constants(weight.num_bits, weight.storage_bits, group, block_k) | block_constants(
        tile, arguments.rank
    )


def _codes(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    return weight.words, weight.high_words, weight.scale, weight.zero, weight.table


def _launch_split(arguments: LinearArguments, tile: Tile, parts: int) -> None:
    x, weight, rank = arguments.x, arguments.weight, arguments.down_rank
    num_rows, width = len(x), weight.out_features
    constants = _constants(arguments, tile)
    sums = x.new_empty(parts, num_rows, width + rank, dtype=torch.float32)
    num_tiles = cdiv(width, tile.block_n) + cdiv(rank, constants["BLOCK_R"])
    inputs = (x, arguments.input_scale, arguments.channel_order)
    linear16.split_kernel[num_tiles, cdiv(num_rows, tile.block_m), parts](
        *inputs, *_codes(weight), arguments.lora_down, sums, num_rows, weight.in_features, width, rank,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
    )  # fmt: skip
    constants = reduce_constants(tile, parts, arguments.rank)
    linear16.reduce_kernel[cdiv(width, constants["BLOCK_N"]), cdiv(num_rows, constants["BLOCK_M"])](
        sums, *inputs, weight.scale, arguments.bias, arguments.lora_up, arguments.component_scale,
        arguments.row_ranks, arguments.output, num_rows, weight.in_features, width, rank, arguments.rank,
        GROUP_SIZE=kernel_group(weight), **constants, num_warps=SMALL_WARPS, num_stages=SMALL_STAGES, **OPTIONS,
    )  # fmt: skip


def _launch_tiled(arguments: LinearArguments, tile: Tile, num_processors: int) -> None:
    weight, num_rows = arguments.weight, len(arguments.x)
    x, reduced, parts = _prepared(arguments, num_processors)
    num_tiles = cdiv(num_rows, tile.block_m) * cdiv(weight.out_features, tile.block_n)
    linear16.tiled_kernel[(num_tiles,)](
        x, *_codes(weight), arguments.bias, reduced, arguments.lora_up, arguments.component_scale,
        arguments.row_ranks, arguments.output, num_rows, weight.in_features, weight.out_features, arguments.rank, parts,
        **_constants(arguments, tile), GROUP_M=GROUP_M,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
    )  # fmt: skip


def _prepared(arguments: LinearArguments, num_processors: int) -> tuple[Tensor, Tensor | None, int]:
    """Inputs divided and gathered, parts of their down-projection or None, and how many parts there are."""
    x, scale, order, down = arguments.x, arguments.input_scale, arguments.channel_order, arguments.lora_down
    is_plain = scale is None and order is None
    if is_plain and down is None:
        return x, None, 1
    (num_rows, in_features), rank = x.shape, arguments.down_rank
    constants = prepare_constants(rank)
    row_tiles, num_blocks = cdiv(num_rows, constants["BLOCK_M"]), cdiv(in_features, constants["BLOCK_K"])
    parts = 1
    while parts < MAX_DOWN_PARTS and parts * row_tiles < num_processors and 2 * parts <= num_blocks:
        parts *= 2
    prepared = None if is_plain else torch.empty_like(x)
    reduced = None if down is None else x.new_empty(parts, num_rows, rank, dtype=torch.float32)
    linear16.prepare_kernel[row_tiles, parts, max(1, cdiv(rank, constants["BLOCK_R"]))](
        x, scale, order, down, prepared, reduced, num_rows, in_features, rank,
        **constants, num_warps=SMALL_WARPS, num_stages=SMALL_STAGES, **OPTIONS,
    )  # fmt: skip
    return x if prepared is None else prepared, reduced, parts
