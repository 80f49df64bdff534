"""The binaries of ``attention`` that are checked ahead of time: shapes of heads as models have them, and the worst.

Their tiles follow from the shape of the heads (``paged.AttentionTile``), not from the table; the number of rows and
splits, windows and 8-bit caches are compiled in.
"""

from collections.abc import Iterator
from typing import NamedTuple

from . import attention
from .paged import DRAFT_SHARE, MAX_SPLITS, MIN_SPLIT_TOKENS, SPLITS_AT_ONCE, AttentionTile
from .variant import Variant

BLOCK_SIZE = 16
_HALF_BYTES = 2
_INTEGERS = ("table_ptr", "context_ptr", "start_ptr", "rows_ptr")
_FLOATS = ("key_scale_ptr", "value_scale_ptr", "partial_ptr", "weight_ptr")


class Heads(NamedTuple):
    """One shape: query heads per key-value head, channels, rows of a draft, a window (0: none), bits of the cache."""

    group: int
    head_dim: int
    max_rows: int = 1
    window: int = 0
    cache_bits: int = 16

    @property
    def title(self) -> str:
        """For a table."""
        window = f", window {self.window}" if self.window else ""
        return f"{self.group} heads of {self.head_dim}, {self.max_rows} rows, {self.cache_bits}-bit cache{window}"


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


def variants(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
    """Every shape on ``arch``, split and added up.

    Args:
        arch: compute capability as one number.
        dtype: of queries and of 16-bit caches, ``bf16`` or ``fp16``.
    """
    for heads in HEADS:
        yield from variants_of(heads, arch, dtype)


def variants_of(heads: Heads, arch: int, dtype: str) -> Iterator[Variant]:
    """Both kernels for one shape."""
    tile = AttentionTile.of(heads.group, heads.head_dim, heads.max_rows, _HALF_BYTES)
    shape = {
        "KV_HEADS": 8,
        "GROUP": heads.group,
        "HEAD_DIM": heads.head_dim,
        "CHANNELS": tile.channels,
        "TILE_TOKENS": tile.tokens,
        "WINDOW": heads.window,
        "NUM_SPLITS": MAX_SPLITS if heads.max_rows == 1 else MAX_SPLITS // DRAFT_SHARE,
        "MIN_SPLIT": MIN_SPLIT_TOKENS,
        "MAX_ROWS": heads.max_rows,
    }
    own = {"TILE_ROWS": tile.rows, "BLOCK_SIZE": BLOCK_SIZE, "HAS_SCALES": heads.cache_bits == 8, "IS_WIDE": False}
    for kernel, name, constants in (
        (attention.attend_split, "attention", shape | own),
        (attention.add_splits, "added up", shape | {"TILE_SPLITS": SPLITS_AT_ONCE}),
    ):
        yield Variant(
            kernel=kernel,
            title=f"{name}, {heads.title}",
            arch=arch,
            tile=None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            types={key: kind for key, kind in _types(heads, dtype).items() if key in kernel.arg_names},
            constants=constants,
            unaligned=frozenset({"table_width", *attention.HOST_MADE}),
        )


def _types(heads: Heads, dtype: str) -> dict[str, str]:
    cache = "*i8" if heads.cache_bits == 8 else f"*{dtype}"
    types = {"query_ptr": f"*{dtype}", "output_ptr": f"*{dtype}", "key_ptr": cache, "value_ptr": cache}
    types |= dict.fromkeys(_INTEGERS, "*i32") | dict.fromkeys(_FLOATS, "*fp32")
    return types | {"table_width": "i32", "score_scale": "fp32"}
