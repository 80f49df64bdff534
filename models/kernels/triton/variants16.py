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
        **dict.fromkeys(("input_scale", "table", "parts", "reduced_parts", "component_scale"), "*fp32"),
        **dict.fromkeys(("scale", "zero"), "*fp16"),
        **dict.fromkeys(("num_rows", "in_features", "out_features", "down_rank", "rank", "num_parts"), "i32"),
        "row_ranks": "*i64",
    }
)
"""Types of the arguments that do not have the inputs' type."""


def variants(arch: int) -> Iterator[Variant]:
    """All binaries for compute capability ``arch`` as one number: bfloat16 inputs, a low-rank term of rank 32.

    Codes of every width in asymmetric groups of 64, and NF4; factors of 16 bits, and with each tile INT8 ones.
    """
    tiles = [tile for tile in TILES if (tile.kernel, tile.arch) == (KERNEL, arch)]
    for tile in tiles:
        yield from _of_format(tile, QuantScheme(tile.num_bits, 64))
        yield from _of_format(tile, QuantScheme(tile.num_bits, 64), has_int8_factors=True)
        if tile.num_bits == 4:
            yield from _of_format(tile, QuantScheme(4, 64, format="nf4"))
    prepare = prepare_constants(RANK)
    for is_int8 in (False, True):
        title = f"prepare, {term_title(has_int8_factors=is_int8)}"
        yield _small(linear16.prepare_kernel, title, arch, prepare, set(), has_int8_factors=is_int8)
    few = {(min(tile.block_m, 2), tile.max_split): tile for tile in tiles if tile.max_split > 1}
    for tile in few.values():
        constants = reduce_constants(tile, tile.max_split, RANK) | {"GROUP_SIZE": 64}
        for is_int8 in (False, True):
            term = term_title(has_int8_factors=is_int8)
            title = f"reduce {tile.max_split} parts of {constants['BLOCK_M']} rows, {term}"
            missing = {"input_scale", "channel_order"}
            yield _small(linear16.reduce_kernel, title, arch, constants, missing, has_int8_factors=is_int8)


def term_title(*, has_int8_factors: bool) -> str:
    """The low-rank term in the title of a binary."""
    return f"rank {RANK} in INT8" if has_int8_factors else f"rank {RANK}"


def factor_types(*, has_int8_factors: bool) -> dict[str, str]:
    """Types of the arguments that INT8 factors change."""
    return dict.fromkeys(("lora_up", "lora_down"), "*i8") if has_int8_factors else {}


def _of_format(tile: Tile, scheme: QuantScheme, *, has_int8_factors: bool = False) -> Iterator[Variant]:
    """The kernels that multiply codes of ``scheme`` in ``tile``."""
    group, bits = scheme.group_size, scheme.num_bits
    constants = format_constants(bits, storage_bits(bits), group, fitting_block(tile.block_k, group))
    constants |= block_constants(tile, RANK)
    missing = {"row_ranks", "bias", "channel_order", "input_scale"}
    missing |= {"zero"} if scheme.is_symmetric else {"table"}
    missing |= set() if scheme.num_bits == 3 else {"high_words"}
    missing |= set() if has_int8_factors else {"component_scale"}
    chosen = [(linear16.split_kernel, "split", constants)] if tile.max_split > 1 else []
    if tile.block_m > 1:
        chosen.append((linear16.tiled_kernel, "tiled", constants | {"GROUP_M": GROUP_M}))
    for kernel, name, values in chosen:
        types = _types(kernel, values, missing, has_int8_factors=has_int8_factors)
        yield Variant(
            kernel, f"{name}, {scheme}, {term_title(has_int8_factors=has_int8_factors)}", tile.arch, tile,
            tile.num_warps, tile.num_stages, types, values | dict.fromkeys(_arguments(kernel, values) & missing),
        )  # fmt: skip


def _small(
    kernel: Any, title: str, arch: int, constants: Mapping[str, int], missing: set[str], *, has_int8_factors: bool
) -> Variant:
    missing = missing | (set() if has_int8_factors else {"component_scale"})
    values = {**constants, **dict.fromkeys(_arguments(kernel, constants) & missing)}
    types = _types(kernel, constants, missing, has_int8_factors=has_int8_factors)
    return Variant(kernel, title, arch, None, SMALL_WARPS, SMALL_STAGES, types, values)


def _arguments(kernel: Any, constants: Mapping[str, int]) -> set[str]:
    return set(kernel.arg_names) - set(constants)


def _types(kernel: Any, constants: Mapping[str, int], missing: set[str], *, has_int8_factors: bool) -> dict[str, str]:
    given = _arguments(kernel, constants) - missing
    known = {**_TYPES, **factor_types(has_int8_factors=has_int8_factors)}
    return {name: known.get(name, "*bf16") for name in kernel.arg_names if name in given}
