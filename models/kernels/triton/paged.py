"""The paged attention kernels behind ``PagedAttention``: sizes of tiles, the number of splits, launches."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..paged import PagedLayer, PagedRows
from .attention import add_splits, attend_split
from .launch16 import OPTIONS

MIN_SPLIT_TOKENS = 128
"""A split reads so many tokens at least: shorter ones would spend their time on the second pass."""
MAX_SPLITS = 32
SPLITS_AT_ONCE = 8
"""That the second pass loads together."""
DRAFT_SHARE = 4
"""Fewer splits where there may be several rows per sequence."""
_LOG2_E = 1.4426950408889634
_LARGEST_TILE = 64 * 128


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Compile-time sizes of ``attend_split`` for one shape of heads.

    rows, channels: of the products, powers of two of 16 or more
    tokens:         of one tile of keys and of values
    """

    rows: int
    channels: int
    tokens: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, group: int, head_dim: int, max_rows: int, query_bytes: int) -> "AttentionTile":
        """For ``group`` query heads per key-value head and up to ``max_rows`` rows of ``query_bytes`` per number."""
        channels = max(16, triton.next_power_of_2(head_dim))
        rows = max(16, triton.next_power_of_2(group * triton.next_power_of_2(max_rows)))
        tokens = max(16, min(64, _LARGEST_TILE * 4 // (channels * query_bytes**2)))
        return cls(rows, channels, tokens, num_warps=4 if rows < 64 else 8)


@dataclass(frozen=True, slots=True)
class TritonPagedAttention:
    """The kernels above behind ``PagedAttention``.

    num_splits: programs that a context is divided among at most, a power of two; see ``splits_for``
    """

    num_splits: int
    min_split_tokens: int = MIN_SPLIT_TOKENS
    name = "triton"

    def __call__(self, query: Tensor, layer: PagedLayer, rows: PagedRows, window: int | None, output: Tensor) -> None:
        """See ``PagedAttention``."""
        _, num_heads, head_dim = query.shape
        num_kv_heads = layer.keys.shape[1]
        group = num_heads // num_kv_heads
        tile = AttentionTile.of(group, head_dim, rows.max_rows, query.element_size())
        shape = {"KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "CHANNELS": tile.channels}
        # A draft's rows are work for more programs as they are, and their parts would take the more memory.
        num_splits = self.num_splits if rows.max_rows == 1 else max(1, self.num_splits // DRAFT_SHARE)
        cut = {
            "TILE_TOKENS": tile.tokens,
            "WINDOW": window or 0,
            "NUM_SPLITS": num_splits,
            "MIN_SPLIT": self.min_split_tokens,
            "MAX_ROWS": rows.max_rows,
        }
        partial = weights = output
        if num_splits > 1:
            parts = (rows.num_sequences, rows.max_rows, num_heads, num_splits)
            partial = torch.empty(*parts, head_dim, dtype=torch.float32, device=query.device)
            weights = torch.empty(parts, dtype=torch.float32, device=query.device)
        lengths = (rows.context_lens, rows.row_starts, rows.num_rows)
        attend_split[rows.num_sequences, num_kv_heads, num_splits](
            query.contiguous(), layer.keys, layer.values,
            _or(layer.key_scales, layer.keys), _or(layer.value_scales, layer.values),
            rows.block_tables, *lengths, output, partial, weights,
            rows.block_tables.stride(0), _LOG2_E * head_dim**-0.5,
            **shape, **cut, TILE_ROWS=tile.rows, BLOCK_SIZE=layer.block_size, HAS_SCALES=layer.key_scales is not None,
            IS_WIDE=query.device.type == "cpu" and query.dtype == torch.bfloat16,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
        )  # fmt: skip
        if num_splits > 1:
            add_splits[rows.num_sequences, num_heads, rows.max_rows](
                partial,
                weights,
                *lengths,
                output,
                **shape,
                **cut,
                TILE_SPLITS=min(SPLITS_AT_ONCE, num_splits),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **OPTIONS,
            )


def splits_for(num_processors: int, num_kv_heads: int) -> int:
    """Splits with which one sequence gives each of the card's ``num_processors`` multiprocessors about two programs."""
    return min(MAX_SPLITS, int(triton.next_power_of_2(-(-2 * num_processors // num_kv_heads))))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a tensor for every argument, also where it reads none."""
    return other if tensor is None else tensor
