"""The binaries of ``attention`` that are checked ahead of time: shapes of heads as models have them, with what costs most.

Their tiles follow from the shape of the heads (``paged.AttentionTile``), not from the table; the number of rows and
splits, windows and 8-bit caches are compiled in.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import attention
from .paged import MAX_SPLITS, MIN_SPLIT_TOKENS, SPLITS_AT_ONCE, AttentionTile
from .tiles import ANY_ROWS, Tile
from .variant import Variant

ARCHITECTURES = (80, 86, 89, 90, 100)
BLOCK_SIZE = 16
_NAME = "attention"
_INTEGERS = ("table_ptr", "context_ptr", "start_ptr", "rows_ptr")
_FLOATS = ("key_scale_ptr", "value_scale_ptr", "partial_ptr", "weight_ptr")


class Heads(NamedTuple):
    """One shape: query heads per key-value head, channels, rows of a draft, a window (0: none), bits of the cache."""

    group: int
    head_dim: int
    max_rows: int = 1
    window: int = 0
    cache_bits: int = 16


HEADS = (
    Heads(1, 128),  # LLaMA-2 7B
    Heads(4, 128),  # LLaMA-3 8B
    Heads(8, 128),  # LLaMA-3 70B
    Heads(3, 64),  # SmolLM2-135M
    Heads(4, 128, window=4096),  # Mistral 7B
    Heads(4, 128, cache_bits=8),
    Heads(8, 128, max_rows=8),
    Heads(8, 256, max_rows=8, cache_bits=8),
    Heads(1, 80),
)


def variants(dtype: str = "bf16") -> Iterator[Variant]:
    """Every shape on every architecture, split and added up.

    Args:
        dtype: of queries and of 16-bit caches, ``bf16`` or ``fp16``.
    """
    for arch in ARCHITECTURES:
        for heads in HEADS:
            yield from variants_of(heads, arch, dtype)


def variants_of(heads: Heads, arch: int, dtype: str) -> Iterator[Variant]:
    """Both kernels for one shape."""
    tile = AttentionTile.of(heads.group, heads.head_dim, heads.max_rows, 2)
    title = f"{heads.group} heads of {heads.head_dim}, {heads.max_rows} rows, {heads.cache_bits}-bit cache"
    title += f", window {heads.window}" if heads.window else ""
    shape = {
        "KV_HEADS": 8,
        "GROUP": heads.group,
        "HEAD_DIM": heads.head_dim,
        "CHANNELS": tile.channels,
        "TILE_TOKENS": tile.tokens,
        "WINDOW": heads.window,
        "NUM_SPLITS": MAX_SPLITS,
        "MIN_SPLIT": MIN_SPLIT_TOKENS,
        "MAX_ROWS": heads.max_rows,
    }
    own = {
        "TILE_ROWS": tile.rows,
        "BLOCK_SIZE": BLOCK_SIZE,
        "HAS_SCALES": heads.cache_bits == 8,
        "IS_WIDE": False,
    }
    sizes = Tile(_NAME, arch, heads.cache_bits, ANY_ROWS, tile.rows, tile.channels, tile.tokens, MAX_SPLITS,
                 tile.num_warps, tile.num_stages)  # fmt: skip
    yield _variant(attention.attend_split, f"split: {title}", sizes, dtype, heads, shape | own)
    yield _variant(attention.add_splits, f"add: {title}", sizes, dtype, heads, shape | {"TILE_SPLITS": SPLITS_AT_ONCE})


def _variant(
    kernel: Any, title: str, tile: Tile, dtype: str, heads: Heads, constants: Mapping[str, object]
) -> Variant:  # fmt: skip
    cache = "*i8" if heads.cache_bits == 8 else f"*{dtype}"
    types = {"query_ptr": f"*{dtype}", "output_ptr": f"*{dtype}", "key_ptr": cache, "value_ptr": cache}
    types |= dict.fromkeys(_INTEGERS, "*i32") | dict.fromkeys(_FLOATS, "*fp32")
    types |= {"table_width": "i32", "score_scale": "fp32"}
    named = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    return Variant(kernel, title, tile, named, dict(constants), frozenset({"table_width", "score_scale"}))
