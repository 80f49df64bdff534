"""Attention of long pieces of prompts over all before them: PyTorch's kernels, or flash-attn where it is there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import causal_attention


@dataclass(frozen=True, slots=True)
class ManyRows:
    """Rows of sequences that each have many of them in this step: queries and keys one sequence behind the other.

    rows:         (num_queries,) int64, which rows of the batch they are
    slots:        (num_keys,) int64, cache slots of all that they see
    query_starts, key_starts: (n + 1,) int32, where each sequence begins, and where the last one ends
    lengths:      on the host: (queries, keys) of each; the last query sees all keys
    """

    rows: Tensor
    slots: Tensor
    query_starts: Tensor
    key_starts: Tensor
    lengths: tuple[tuple[int, int], ...]


class PrefillAttention(Protocol):
    """Causal attention of many rows per sequence."""

    @property
    def name(self) -> str:
        """Short name, as shown to the user."""
        ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, many: ManyRows, window: int | None) -> Tensor:
        """Attend.

        Args:
            query: (num_queries, num_heads, head_dim), rotated.
            key, value: (num_keys, num_kv_heads, head_dim), dtype of ``query``.
            many: which rows and keys belong together.
            window: tokens that a row sees at most, itself included; None: all.

        Returns:
            Like ``query``.
        """
        ...


class SdpaPrefill:
    """``scaled_dot_product_attention``, sequence by sequence: FlashAttention on CUDA, where only causality masks.

    Sliding windows shorter than what is seen are masks, 512 queries at a time.
    """

    name = "sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, many: ManyRows, window: int | None) -> Tensor:
        """See ``PrefillAttention``."""
        pieces = [_attend(*piece, window) for piece in _pieces(query, key, value, many)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _pieces(query: Tensor, key: Tensor, value: Tensor, many: ManyRows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    first_query = first_key = 0
    for num_queries, num_keys in many.lengths:
        keys = slice(first_key, first_key + num_keys)
        yield query[first_query : first_query + num_queries], key[keys], value[keys]
        first_query, first_key = first_query + num_queries, first_key + num_keys


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    is_masked = window is not None and window < len(key)
    # The bias stands for a mask that is never made; on a CPU it would be made, where causal_attention makes less of it.
    if is_masked or len(query) == len(key) or query.device.type != "cuda":
        return causal_attention(query[None], key[None], value[None], window)[0]
    # It brings PyTorch's compiler along, Triton included: seconds, and a third of a server's memory on a CPU.
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(len(query), len(key))
    is_grouped = query.shape[1] != key.shape[1]
    queries, keys, values = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=is_grouped)
    return attended[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class FlashAttnPrefill:
    """The package flash-attn: all sequences in one call, windows without masks.

    function: its ``flash_attn_varlen_func``
    """

    function: Callable[..., Tensor]
    name = "flash-attn"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, many: ManyRows, window: int | None) -> Tensor:
        """See ``PrefillAttention``."""
        return self.function(
            query,
            key,
            value,
            cu_seqlens_q=many.query_starts,
            cu_seqlens_k=many.key_starts,
            max_seqlen_q=max(num_queries for num_queries, _ in many.lengths),
            max_seqlen_k=max(num_keys for _, num_keys in many.lengths),
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
