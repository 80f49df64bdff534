"""The binaries of ``linear16`` that are checked ahead of time: every tile, with the formats that cost most."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ...scheme import QuantScheme
from . import linear16
from .launch16 import (
    GROUP_M,
    SMALL_STAGES,
    SMALL_WARPS,
    block_constants,
    fitting_block,
    format_constants,
    prepare_constants,
    reduce_constants,
)
from .layer16 import KERNEL
from .pack import storage_bits
from .tiles import TILES, Tile
from .variant import Variant

RANK = 32
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("channel_order", "words", "high_words"), "*i32"),
        **dict.fromkeys(("input_scale", "table", "parts", "reduced_parts"), "*fp32"),
        **dict.fromkeys(("scale", "zero"), "*fp16"),
        **dict.fromkeys(("num_rows", "in_features", "out_features", "down_rank", "rank", "num_parts"), "i32"),
        "row_ranks": "*i64",
    }
)
"""Types of the arguments that do not have the inputs' type."""


def variants(arch: int) -> Iterator[Variant]:
    """All binaries for compute capability ``arch`` as one number: bfloat16 inputs, a low-rank term of rank 32.

    Codes of every width in asymmetric groups of 64, and NF4.
    """
    tiles = [tile for tile in TILES if (tile.kernel, tile.arch) == (KERNEL, arch)]
    for tile in tiles:
        yield from _of_format(tile, QuantScheme(tile.num_bits, 64))
        if tile.num_bits == 4:
            yield from _of_format(tile, QuantScheme(4, 64, format="nf4"))
    prepare = prepare_constants(RANK)
    yield _small(linear16.prepare_kernel, f"prepare, rank {RANK}", arch, prepare, {"bias", "row_ranks"})
    few = {(min(tile.block_m, 2), tile.max_split): tile for tile in tiles if tile.max_split > 1}
    for tile in few.values():
        constants = reduce_constants(tile, tile.max_split, RANK) | {"GROUP_SIZE": 64}
        title = f"reduce {tile.max_split} parts of {constants['BLOCK_M']} rows, rank {RANK}"
        yield _small(linear16.reduce_kernel, title, arch, constants, {"input_scale", "channel_order"})


def _of_format(tile: Tile, scheme: QuantScheme) -> Iterator[Variant]:
    """The kernels that multiply codes of ``scheme`` in ``tile``."""
    group, bits = scheme.group_size, scheme.num_bits
    constants = format_constants(bits, storage_bits(bits), group, fitting_block(tile.block_k, group))
    constants |= block_constants(tile, RANK)
    missing = {"row_ranks", "bias", "channel_order", "input_scale"}
    missing |= {"zero"} if scheme.is_symmetric else {"table"}
    missing |= set() if scheme.num_bits == 3 else {"high_words"}
    chosen = [(linear16.split_kernel, "split", constants)] if tile.max_split > 1 else []
    if tile.block_m > 1:
        chosen.append((linear16.tiled_kernel, "tiled", constants | {"GROUP_M": GROUP_M}))
    for kernel, name, values in chosen:
        yield Variant(
            kernel, f"{name}, {scheme}, rank {RANK}", tile.arch, tile, tile.num_warps, tile.num_stages,
            _types(kernel, values, missing), values | dict.fromkeys(_arguments(kernel, values) & missing),
        )  # fmt: skip


def _small(kernel: Any, title: str, arch: int, constants: Mapping[str, int], missing: set[str]) -> Variant:
    values = {**constants, **dict.fromkeys(_arguments(kernel, constants) & missing)}
    types = _types(kernel, constants, missing)
    return Variant(kernel, title, arch, None, SMALL_WARPS, SMALL_STAGES, types, values)


def _arguments(kernel: Any, constants: Mapping[str, int]) -> set[str]:
    return set(kernel.arg_names) - set(constants)


def _types(kernel: Any, constants: Mapping[str, int], missing: set[str]) -> dict[str, str]:
    given = _arguments(kernel, constants) - missing
    return {name: _TYPES.get(name, "*bf16") for name in kernel.arg_names if name in given}
