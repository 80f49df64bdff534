"""Causal attention over a ragged batch: spans that fit one call are grouped, the rest are served one by one.

A plan is made once per forward pass and window, and every layer with that window uses it:
- neighbouring spans of equal length that see only their own rows: one batched causal call;
- neighbouring spans of one new token (decode): one call over contexts padded to the longest, masked;
- a span whose context goes back further than its rows (chunked prefill): one call, query chunk by query chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batch import Batch, SequenceSpan
from .kv_cache import PagedKVCache

QUERY_CHUNK = 512
"""Queries per masked call: bounds the mask to 512 x context, where a long prompt's whole mask would be quadratic."""


class LayerAttention(Protocol):
    """How the layers with one sliding window attend over a batch."""

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, kv_cache: PagedKVCache | None
    ) -> Tensor:
        """See ``AttentionPlan.attend``."""
        ...


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """Spans next to each other that one call serves: rows ``start .. start + num_sequences * num_tokens``.

    slots:   (num_sequences, num_visible) int64 cache slots that the queries see; None: the rows' own keys
    is_seen: (num_sequences, 1, 1, num_visible) bool, False where a shorter context was padded; None: no padding
    """

    start: int
    num_sequences: int
    num_tokens: int
    slots: Tensor | None = None
    is_seen: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the layers with one sliding window attend over a batch.

    slot_mapping: (num_tokens,) int64, where each row's key and value are stored; None: no cache in use
    """

    groups: tuple[SpanGroup, ...]
    window: int | None
    slot_mapping: Tensor | None

    @classmethod
    def of(cls, batch: Batch, window: int | None, has_cache: bool) -> Self:
        """Plan the attention of ``batch``.

        Raises:
            ValueError: the spans' slots do not go with ``has_cache``.
        """
        if has_cache and any(span.slots is None for span in batch.spans):
            raise ValueError("a batch that runs with a key-value cache needs slots in every span")
        if not has_cache and any(span.context_len > span.num_tokens for span in batch.spans):
            raise ValueError("a span with earlier context needs the key-value cache that holds it")
        groups = []
        for _, members in groupby(batch.spans, lambda span: _grouping_key(span, window)):
            groups.append(_group(list(members), window))
        return cls(tuple(groups), window, batch.slot_mapping if has_cache else None)

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, kv_cache: PagedKVCache | None
    ) -> Tensor:
        """Attention of every row over what it may see.

        Args:
            layer_index: which layer's cache to use.
            query: (num_tokens, num_heads, head_dim), rotated.
            key, value: (num_tokens, num_kv_heads, head_dim), the key rotated.
            kv_cache: receives key and value, and supplies those of earlier tokens.

        Returns:
            (num_tokens, num_heads * head_dim), dtype of ``query``.
        """
        if kv_cache is not None and self.slot_mapping is not None:
            # A row sees its own sequence as later rows will: how a prompt is cut makes no difference.
            key, value = (rows.to(query.dtype) for rows in kv_cache.write(layer_index, key, value, self.slot_mapping))
        outputs = []
        for group in self.groups:
            rows = slice(group.start, group.start + group.num_sequences * group.num_tokens)
            if group.slots is None or kv_cache is None:
                seen_key, seen_value = _split(key[rows], group), _split(value[rows], group)
            else:
                cached_key, cached_value = kv_cache.read(layer_index, group.slots)
                seen_key, seen_value = cached_key.to(query.dtype), cached_value.to(query.dtype)
            attended = causal_attention(_split(query[rows], group), seen_key, seen_value, self.window, group.is_seen)
            outputs.append(attended.flatten(0, 1).flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _grouping_key(span: SequenceSpan, window: int | None) -> tuple[object, ...]:
    """Neighbours with equal keys form a group."""
    if span.slots is None or span.context_len == span.num_tokens:
        return ("own rows", span.num_tokens)
    if span.num_tokens == 1:
        # Contexts within a factor of two share a call: padding them to the longest at most doubles the work.
        return ("decode", _num_visible(span, window).bit_length())
    return ("chunk", span.start)


def _num_visible(span: SequenceSpan, window: int | None) -> int:
    """Context tokens that at least one of the span's queries sees."""
    return span.context_len if window is None else min(span.context_len, span.num_tokens + window - 1)


def _group(spans: Sequence[SequenceSpan], window: int | None) -> SpanGroup:
    first = spans[0]
    group = SpanGroup(first.start, len(spans), first.num_tokens)
    if first.slots is None or first.context_len == first.num_tokens:
        return group
    visible = [span.slots[-_num_visible(span, window) :] for span in spans if span.slots is not None]
    slots = pad_sequence(visible, batch_first=True)
    if all(len(item) == slots.shape[1] for item in visible):
        return SpanGroup(first.start, len(spans), first.num_tokens, slots)
    lengths = torch.tensor([len(item) for item in visible], device=slots.device)
    is_seen = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
    # Padding reads the sequence's own first slot: another's garbage would turn 0 * nan into nan.
    slots = torch.where(is_seen, slots, slots[:, :1])
    return SpanGroup(first.start, len(spans), first.num_tokens, slots, is_seen[:, None, None])


def _split(rows: Tensor, group: SpanGroup) -> Tensor:
    """(num_sequences * num_tokens, heads, head_dim) -> (num_sequences, num_tokens, heads, head_dim)."""
    return rows.reshape(group.num_sequences, group.num_tokens, *rows.shape[1:])


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, is_seen: Tensor | None = None
) -> Tensor:
    """(sequences, tokens, heads, head_dim) in and out; the last query is aligned with the last key."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == 1:
        attended = _sdpa(query, key, value, is_seen)
    elif num_queries == num_keys and (window is None or window >= num_keys):
        attended = _sdpa(query, key, value, is_causal=True)
    else:
        starts = range(0, num_queries, QUERY_CHUNK)
        attended = torch.cat([_attend_chunk(query, key, value, window, start) for start in starts], dim=2)
    return attended.transpose(1, 2)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, window: int | None, start: int) -> Tensor:
    """Queries ``start .. start + QUERY_CHUNK`` over the keys that at least one of them sees."""
    offset = key.shape[2] - query.shape[2]
    query = query[:, :, start : start + QUERY_CHUNK]
    first = offset + start
    end = first + query.shape[2]
    low = 0 if window is None else max(0, first - window + 1)
    distance = torch.arange(first, end, device=key.device)[:, None] - torch.arange(low, end, device=key.device)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return _sdpa(query, key[:, :, low:end], value[:, :, low:end], mask)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)
