"""The binaries of ``linear16`` that are checked ahead of time: every tile, with the formats that cost most registers."""

from collections.abc import Iterator
from typing import Any

from ...scheme import QuantScheme
from . import linear16
from .launch16 import (
    GROUP_M,
    MAX_DOWN_PARTS,
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
_TABLE_FORMATS = frozenset({"mxfp4", "nf4"})
_CODES = ("words", "high_words", "scale", "zero", "table")


def variants(dtype: str = "bf16") -> Iterator[Variant]:
    """Every row of the table with codes of its width: asymmetric in groups of 64, and for 4 bits NF4 too.

    Args:
        dtype: of inputs, ``bf16`` or ``fp16``.
    """
    for tile in TILES:
        if tile.kernel != KERNEL:
            continue
        schemes = [QuantScheme(tile.num_bits, 64)]
        if tile.num_bits == 4:
            schemes.append(QuantScheme(4, 64, format="nf4"))
        for scheme in schemes:
            yield from variants_of(tile, scheme, dtype)


def variants_of(tile: Tile, scheme: QuantScheme, dtype: str) -> Iterator[Variant]:
    """The kernels that run with ``tile``, for weights in ``scheme`` with a correction of rank 32."""
    title = f"{scheme}, rank {RANK}"
    is_split = tile.block_m == 1 or tile.max_split > 1
    if is_split:
        yield _variant(linear16.split_kernel, f"split: {title}", tile, scheme, dtype)
        reduce = reduce_constants(tile, tile.max_split, RANK)
        yield _variant(linear16.reduce_kernel, f"reduce: {title}", tile, scheme, dtype, reduce)
    if tile.block_m > 1:
        parts = {"SPLIT": MAX_DOWN_PARTS, "GROUP_M": GROUP_M}
        yield _variant(linear16.tiled_kernel, f"tiled: {title}", tile, scheme, dtype, parts)
        prepare = prepare_constants(RANK)
        yield _variant(linear16.prepare_kernel, f"prepare: rank {RANK}", tile, scheme, dtype, prepare)


def _variant(
    kernel: Any, title: str, tile: Tile, scheme: QuantScheme, dtype: str, more: dict[str, int] | None = None
) -> Variant:
    group = max(scheme.group_size, 0)
    constants: dict[str, Any] = format_constants(
        scheme.num_bits, storage_bits(scheme.num_bits), group, fitting_block(tile.block_k, group)
    )
    constants |= block_constants(tile, RANK) | (more or {})
    missing = {"row_ranks", "bias", "channel_order", "input_scale"}
    missing |= set() if scheme.num_bits == 3 else {"high_words"}
    missing |= {"zero"} if scheme.is_symmetric else set()
    missing |= set() if scheme.format in _TABLE_FORMATS else {"table"}
    if kernel is linear16.prepare_kernel:
        missing = {"row_ranks", "bias"}
    names = [name for name in kernel.arg_names if name not in constants]
    return Variant(
        kernel=kernel,
        title=title,
        tile=tile,
        types={name: _TYPES.get(name, f"*{dtype}") for name in names if name not in missing},
        constants={name: value for name, value in constants.items() if name in kernel.arg_names}
        | {name: None for name in names if name in missing},
    )


_TYPES = {
    "input_scale": "*fp32",
    "channel_order": "*i32",
    "words": "*i32",
    "high_words": "*i32",
    "scale": "*fp16",
    "zero": "*fp16",
    "table": "*fp32",
    "parts": "*fp32",
    "reduced_parts": "*fp32",
    "row_ranks": "*i64",
    "num_rows": "i32",
    "in_features": "i32",
    "out_features": "i32",
    "down_rank": "i32",
    "rank": "i32",
}
"""Types of arguments that do not have the inputs' type."""
