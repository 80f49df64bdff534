"""The binaries of the INT8 path checked ahead of time: every tile, with the formats that cost most registers."""

from collections.abc import Iterator
from typing import Any

from ...scheme import ActivationScheme, QuantScheme
from . import linear8
from .integer import has_offset, input_group
from .layer8 import KERNEL, constants
from .tiles import TILES, Tile
from .variant import Variant

RANK = 32
ACTIVATIONS = (ActivationScheme(8), ActivationScheme(8, 128))


def variants(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
    """Every row of the table with codes of its width, asymmetric in groups of 64, and inputs per token and in groups.

    Args:
        arch: compute capability as one number.
        dtype: of outputs, ``bf16`` or ``fp16``.
    """
    for tile in TILES:
        if tile.kernel == KERNEL and tile.arch == arch:
            for activations in ACTIVATIONS:
                yield variant_of(tile, QuantScheme(tile.num_bits, 64), activations, dtype)


def variant_of(tile: Tile, scheme: QuantScheme, activations: ActivationScheme, dtype: str = "bf16") -> Variant:
    """``linear8_kernel`` with ``tile``, for a layer with a correction of rank 32."""
    fixed: dict[str, Any] = dict(
        constants(scheme.num_bits, max(scheme.group_size, 0), input_group(activations), RANK, tile)
    )
    missing = {"bias", "row_ranks"} | (set() if scheme.num_bits == 3 else {"high_words"})
    missing |= {"zero", "sums"} if scheme.is_symmetric else set()
    missing |= set() if has_offset(activations) else {"input_offset", "column_sums"}
    names = [name for name in linear8.linear8_kernel.arg_names if name not in fixed]
    types = _TYPES | {"output": f"*{dtype}" if tile.max_split == 1 else "*fp32"}
    return Variant(
        kernel=linear8.linear8_kernel,
        title=f"{scheme}, inputs {activations}, rank {RANK}",
        tile=tile,
        types={name: types.get(name, f"*{dtype}") for name in names if name not in missing},
        constants=fixed | {name: None for name in names if name in missing},
        unaligned=frozenset({"num_rows", "num_input_groups"}),
    )


_TYPES = {
    "codes": "*i8",
    "input_scale": "*fp32",
    "input_offset": "*fp32",
    "sums": "*i32",
    "words": "*i32",
    "high_words": "*i32",
    "scale": "*fp16",
    "zero": "*fp16",
    "column_sums": "*fp32",
    "row_ranks": "*i64",
    "num_rows": "i32",
    "in_features": "i32",
    "out_features": "i32",
    "code_stride": "i32",
    "num_input_groups": "i32",
    "rank": "i32",
}
"""Types of arguments that do not have the layer's type."""
