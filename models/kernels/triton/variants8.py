"""The binaries of the INT8 path checked ahead of time: every tile, with the formats that cost most registers."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ...scheme import ActivationScheme, QuantScheme
from .inputs import FEW_TOKENS, MAX_WHOLE, MAX_WHOLE_ROTATED, input_constants, input_tile
from .integer import has_offset, input_group
from .launch16 import SMALL_STAGES, SMALL_WARPS
from .layer8 import ADDED_AT_ONCE, KERNEL, constants
from .linear8 import add_parts_kernel, linear8_kernel
from .quantize import input_kernel
from .tiles import TILES, Tile
from .variant import Variant
from .variants16 import RANK, factor_types, term_title

DTYPE = "bf16"
"""Of the layer: float16 takes as many registers."""
PER_TOKEN, GROUPED = ActivationScheme(8), ActivationScheme(8, 128)
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("channel_order", "words", "high_words", "sums", "sums_out"), "*i32"),
        **dict.fromkeys(("divisor", "input_scale", "input_offset", "column_sums", "parts"), "*fp32"),
        **dict.fromkeys(("scale_out", "offset_out", "component_scale"), "*fp32"),
        **dict.fromkeys(("scale", "zero"), "*fp16"),
        **dict.fromkeys(("num_rows", "num_tokens", "num_input_groups", "size", "rank"), "i32"),
        **dict.fromkeys(("in_features", "out_features", "code_stride", "x_stride", "out_stride"), "i32"),
        "codes": "*i8",
        "row_ranks": "*i64",
        "clip_ratio": "fp32",
    }
)
"""Types of the arguments that do not have the layer's type."""
_UNALIGNED = frozenset({"num_rows", "num_tokens", "num_input_groups", "size", "clip_ratio"})


def variants(arch: int) -> Iterator[Variant]:
    """All binaries for ``arch``: codes of every width in asymmetric groups of 64, terms of rank 32 in 16 bits and INT8.

    Args:
        arch: compute capability as one number.
    """
    for tile in TILES:
        if (tile.kernel, tile.arch) == (KERNEL, arch):
            for is_int8 in (False, True):
                yield product_variant(tile, QuantScheme(tile.num_bits, 64), PER_TOKEN, has_int8_factors=is_int8)
            if tile.num_bits == 4:
                yield product_variant(tile, QuantScheme(4, 64), GROUPED)
    for num_tokens, in_features, rotation, scheme in (
        (FEW_TOKENS, MAX_WHOLE, 0, PER_TOKEN),
        (FEW_TOKENS, MAX_WHOLE_ROTATED, MAX_WHOLE_ROTATED, PER_TOKEN),
        (FEW_TOKENS, MAX_WHOLE_ROTATED, 128, GROUPED),
        (FEW_TOKENS + 1, MAX_WHOLE, 128, PER_TOKEN),
        (FEW_TOKENS + 1, MAX_WHOLE, 128, GROUPED),
    ):
        for is_int8 in (False, True):
            yield input_variant(arch, num_tokens, in_features, rotation, scheme, has_int8_factors=is_int8)
    fixed = {"NUM_PARTS": 16, "BLOCK": ADDED_AT_ONCE}
    yield _variant(add_parts_kernel, "add 16 parts", arch, fixed, set(), types={"output": f"*{DTYPE}"})


def product_variant(
    tile: Tile, scheme: QuantScheme, activations: ActivationScheme, *, has_int8_factors: bool = False
) -> Variant:
    """``linear8_kernel`` with ``tile``."""
    fixed = constants(scheme.num_bits, max(scheme.group_size, 0), input_group(activations), RANK, tile)
    missing = {"bias", "row_ranks"} | (set() if scheme.num_bits == 3 else {"high_words"})
    missing |= {"zero", "sums"} if scheme.is_symmetric else set()
    missing |= set() if has_offset(activations) else {"input_offset", "column_sums"}
    types = {"output": f"*{DTYPE}" if tile.max_split == 1 else "*fp32"}
    types |= factor_types(has_int8_factors=has_int8_factors)
    title = f"integer, {scheme}, inputs {activations}, {term_title(has_int8_factors=has_int8_factors)}"
    return _variant(linear8_kernel, title, tile.arch, fixed, missing, types=types, tile=tile)


def input_variant(
    arch: int,
    num_tokens: int,
    in_features: int,
    rotation: int,
    scheme: ActivationScheme,
    *,
    has_int8_factors: bool = False,
) -> Variant:
    """``input_kernel`` for a layer that divides, gathers and rotates."""
    tile = input_tile(num_tokens, in_features, rotation, input_group(scheme), RANK)
    fixed = input_constants(scheme, rotation, tile, 64, is_integer=True)
    title = f"input, {scheme}, {tile.block_m} x {tile.block_k}, rotated by {rotation}, {tile.chunk} components"
    title += " in INT8" if has_int8_factors else ""
    types = {"out": "*i8"} | factor_types(has_int8_factors=has_int8_factors)
    missing = set() if has_int8_factors else {"component_scale"}
    return _variant(input_kernel, title, arch, fixed, missing, types=types, num_warps=tile.num_warps)


def _variant(
    kernel: Any,
    title: str,
    arch: int,
    fixed: Mapping[str, object],
    missing: set[str],
    *,
    types: Mapping[str, str],
    tile: Tile | None = None,
    num_warps: int = SMALL_WARPS,
) -> Variant:
    known = {**_TYPES, **types}
    given = [name for name in kernel.arg_names if name not in fixed and name not in missing]
    return Variant(
        kernel=kernel,
        title=title,
        arch=arch,
        tile=tile,
        num_warps=num_warps if tile is None else tile.num_warps,
        num_stages=SMALL_STAGES if tile is None else tile.num_stages,
        types={name: known.get(name, f"*{DTYPE}") for name in given},
        constants={**fixed, **dict.fromkeys(missing)},
        unaligned=_UNALIGNED,
    )
