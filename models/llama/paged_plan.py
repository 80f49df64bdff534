"""Attention of one step over the paged cache: which rows go to which kernel, worked out once for all layers.

Rows of a decode, and of a short draft, go to the paged kernel, which reads the cache where it lies. Longer pieces of
prompts go to the prefill kernel, together with everything before them, which is gathered from the cache first: they
read it so often that the copy costs nothing beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged import MAX_FEW_ROWS, PagedRows
from .attention_choice import AttentionChoice
from .batch import SequenceSpan
from .kv_cache import PagedKVCache
from .prefill import ManyRows


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """The rows of one step.

    slot_mapping: (num_tokens,) int64, where each row's key and value are stored
    few:          sequences with few new rows; None: there are none
    many:         sequences with many; None: there are none
    """

    slot_mapping: Tensor
    few: PagedRows | None
    many: ManyRows | None

    @classmethod
    def of(cls, spans: Sequence[SequenceSpan], cache: PagedKVCache, device: torch.device) -> Self:
        """Lay out ``spans``, which cover the rows of a batch in order, with one copy to ``device``.

        Raises:
            ValueError: a span without a block table, or one that is too short or names blocks that are not there.
        """
        slots = [_slots(span, cache) for span in spans]
        few = [index for index, span in enumerate(spans) if span.num_tokens <= MAX_FEW_ROWS]
        many = [index for index, span in enumerate(spans) if span.num_tokens > MAX_FEW_ROWS]
        new_slots = [it[-span.num_tokens :] for span, it in zip(spans, slots, strict=True)]
        numbers = _Numbers()
        mapping = numbers.add(np.concatenate(new_slots))
        few_numbers = _few(numbers, [spans[index] for index in few], cache.block_size) if few else None
        many_numbers = _many(numbers, [spans[i] for i in many], [slots[i] for i in many]) if many else None
        numbers.copy_to(device)
        return cls(
            numbers.get(mapping),
            None if few_numbers is None else few_numbers.rows(numbers),
            None if many_numbers is None else many_numbers.rows(numbers),
        )


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """How the layers with one sliding window attend in one step; a ``LayerAttention``."""

    layout: PagedLayout
    choice: AttentionChoice
    window: int | None

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, kv_cache: PagedKVCache | None
    ) -> Tensor:
        """See ``AttentionPlan.attend``.

        Raises:
            ValueError: there is no cache.
        """
        if kv_cache is None:
            raise ValueError("paged attention needs a key-value cache")
        layout = self.layout
        kv_cache.write(layer_index, key, value, layout.slot_mapping)
        output = torch.empty_like(query)
        if layout.few is not None:
            self.choice.decode(query, kv_cache.layer(layer_index), layout.few, self.window, output)
        if layout.many is not None:
            many = layout.many
            keys, values = (rows.to(query.dtype) for rows in kv_cache.read(layer_index, many.slots))
            attended = self.choice.prefill(query.index_select(0, many.rows), keys, values, many, self.window)
            output.index_copy_(0, many.rows, attended)
        return output.flatten(1)


class _Numbers:
    """Integers that go to the device in one copy."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self._end = 0
        self._device = torch.empty(0, dtype=torch.int64)

    def add(self, values: "np.ndarray[tuple[int], np.dtype[np.int64]] | Sequence[int]") -> slice:
        part = np.asarray(values, dtype=np.int64)
        self._parts.append(part)
        start, self._end = self._end, self._end + len(part)
        return slice(start, self._end)

    def copy_to(self, device: torch.device) -> None:
        self._device = torch.from_numpy(np.concatenate(self._parts)).to(device)

    def get(self, place: slice) -> Tensor:
        return self._device[place]


@dataclass(frozen=True, slots=True)
class _Few:
    place: slice
    num_sequences: int
    max_rows: int

    def rows(self, numbers: _Numbers) -> PagedRows:
        columns = numbers.get(self.place).int()
        lengths = columns[: 3 * self.num_sequences].view(3, -1)
        tables = columns[3 * self.num_sequences :].view(self.num_sequences, -1)
        return PagedRows(lengths[0], lengths[1], lengths[2], tables, self.max_rows)


def _few(numbers: _Numbers, spans: Sequence[SequenceSpan], block_size: int) -> _Few:
    counts = [-(-span.context_len // block_size) for span in spans]
    tables = np.zeros((len(spans), max(counts)), dtype=np.int64)
    for table, span, count in zip(tables, spans, counts, strict=True):
        table[:count] = (span.block_table or ())[:count]
    lengths = [(span.start, span.num_tokens, span.context_len) for span in spans]
    columns = np.asarray(lengths, dtype=np.int64).T.ravel()
    place = numbers.add(np.concatenate((columns, tables.ravel())))
    # One or the most: kernels are compiled for each number, and not in the middle of a request.
    max_rows = 1 if all(span.num_tokens == 1 for span in spans) else MAX_FEW_ROWS
    return _Few(place, len(spans), max_rows)


@dataclass(frozen=True, slots=True)
class _Many:
    row_place: slice
    slot_place: slice
    start_place: slice
    lengths: tuple[tuple[int, int], ...]

    def rows(self, numbers: _Numbers) -> ManyRows:
        starts = numbers.get(self.start_place).int().view(2, -1)
        rows, slots = numbers.get(self.row_place), numbers.get(self.slot_place)
        return ManyRows(rows, slots, starts[0], starts[1], self.lengths)


def _many(
    numbers: _Numbers,
    spans: Sequence[SequenceSpan],
    slots: Sequence["np.ndarray[tuple[int], np.dtype[np.int64]]"],
) -> _Many:
    lengths = tuple((span.num_tokens, span.context_len) for span in spans)
    starts = np.concatenate([np.zeros((1, 2), dtype=np.int64), np.cumsum(lengths, 0)]).T.ravel()
    rows = np.concatenate([np.arange(span.start, span.start + span.num_tokens) for span in spans])
    return _Many(numbers.add(rows), numbers.add(np.concatenate(slots)), numbers.add(starts), lengths)


def _slots(span: SequenceSpan, cache: PagedKVCache) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Cache slots of all the tokens of ``span``, in order."""
    if span.block_table is None:
        raise ValueError("a batch that runs with this key-value cache needs a block table in every span")
    num_blocks = -(-span.context_len // cache.block_size)
    table = np.asarray(span.block_table[:num_blocks], dtype=np.int64)
    if len(table) < num_blocks or table.min() < 0 or table.max() >= cache.num_blocks:
        raise ValueError(
            f"a sequence of {span.context_len} tokens needs {num_blocks} of {cache.num_blocks} blocks, "
            f"its table is {list(span.block_table)}"
        )
    slots = table[:, None] * cache.block_size + np.arange(cache.block_size)
    return slots.ravel()[: span.context_len]
