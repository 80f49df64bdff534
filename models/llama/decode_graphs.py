"""Decode steps recorded once and replayed: the whole network as one launch, without Python between its kernels.

A step of one new token per sequence does the same work every time; only numbers differ. They lie in buffers that stay
where they are, and a recorded step reads them from there: token ids, positions, slots, block tables, lengths, ranks.
One step is recorded for each of several batch sizes, and a batch runs in the next larger one. The rows that fill it up
are sequences of one token in a scratch block that no request owns, and nobody reads what they give. Sizes are recorded
largest first, in one memory pool: what they compute in between takes no more than the largest does.

Rows of different rank go through a second recording of each size; without ranks, there is nothing to mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.paged import PagedRows
from ..types import RowRanks
from .attention_choice import AttentionChoice
from .batch import ALL_COMPONENTS, Batch, SequenceSpan, TokenBatch, rank_of
from .kv_cache import PagedKVCache
from .model import LlamaForCausalLM
from .paged_plan import PagedLayout, PagedPlan


class RecordedStep(Protocol):
    """What a device recorded."""

    @property
    def output(self) -> Tensor:
        """What the recorded function returned; a replay writes over it."""
        ...

    def replay(self) -> None:
        """Run all of it again, on what its inputs hold now."""
        ...


class GraphDevice(Protocol):
    """A device that records launches: CUDA, or what stands in for it in a test."""

    def record(self, run: Callable[[], Tensor]) -> RecordedStep:
        """Record what ``run`` launches, after a run to warm up; all recordings share one memory pool."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that the recordings hold."""
        ...


def graph_sizes(max_num_seqs: int, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """Batch sizes to record, ascending: those ``asked`` for up to ``max_num_seqs``, or 1, 2, 4, ... and itself."""
    if asked:
        return tuple(sorted({min(size, max_num_seqs) for size in asked}))
    doubling = [1 << exponent for exponent in range(max_num_seqs.bit_length())]
    return tuple(sorted({*doubling, max_num_seqs}))


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Inputs of recorded steps at fixed addresses, and the host's copy of them.

    numbers: (5, size) int64: token ids, positions, slots, ranks, lengths
    tables:  (size, width) int32: blocks of each sequence
    starts, ones: (size,) int32: row i is all of sequence i
    """

    numbers: Tensor
    tables: Tensor
    starts: Tensor
    ones: Tensor
    host_numbers: Tensor
    host_tables: Tensor

    @classmethod
    def of(cls, size: int, width: int, device: torch.device) -> "StepBuffers":
        """For up to ``size`` sequences of up to ``width`` blocks."""
        is_pinned = device.type == "cuda"
        return cls(
            numbers=torch.zeros(5, size, dtype=torch.int64, device=device),
            tables=torch.zeros(size, width, dtype=torch.int32, device=device),
            starts=torch.arange(size, dtype=torch.int32, device=device),
            ones=torch.ones(size, dtype=torch.int32, device=device),
            host_numbers=torch.zeros(5, size, dtype=torch.int64, pin_memory=is_pinned),
            host_tables=torch.zeros(size, width, dtype=torch.int32, pin_memory=is_pinned),
        )

    def copy(self, size: int) -> None:
        """The first ``size`` sequences from the host to the device."""
        self.numbers.copy_(self.host_numbers)
        self.tables[:size].copy_(self.host_tables[:size])

    def rows(self, size: int) -> PagedRows:
        """What attention reads of the first ``size`` sequences."""
        return PagedRows(self.starts[:size], self.ones[:size], self.numbers[4, :size].int(), self.tables[:size], 1)


class DecodeGraphs:
    """Recorded decode steps of one network over one cache.

    Args:
        network: its layers.
        choice: the kernels that attend.
        cache: keys and values, with a scratch block.
        sizes: batch sizes to record.
        max_context: tokens of the longest sequence.
        has_ranks: also for rows that get less of the corrections.
    """

    def __init__(
        self,
        network: LlamaForCausalLM,
        choice: AttentionChoice,
        cache: PagedKVCache,
        sizes: Sequence[int],
        max_context: int,
        *,
        has_ranks: bool,
    ) -> None:
        if not cache.has_scratch:
            raise ValueError("recorded steps need a cache with a scratch block for the rows that fill them up")
        self.cache = cache
        self.sizes = tuple(sorted(sizes))
        self._network = network
        self._choice = choice
        self._buffers = StepBuffers.of(self.sizes[-1], -(-max_context // cache.block_size), network.device)
        self._numbers, self._tables = (host.numpy() for host in (self._buffers.host_numbers, self._buffers.host_tables))
        self._kinds = (False, True) if has_ranks else (False,)
        self._held: list[list[int]] = [[] for _ in range(self.sizes[-1])]
        self._steps: dict[tuple[int, bool], RecordedStep] = {}

    @torch.inference_mode()
    def record(self, device: GraphDevice) -> None:
        """Record every size, largest first; the buffers hold nothing but rows that fill up then."""
        for row in range(self.sizes[-1]):
            self._fill_up(row)
        for size in reversed(self.sizes):
            self._buffers.copy(size)
            for has_ranks in self._kinds:
                self._steps[size, has_ranks] = device.record(partial(self._run, size, has_ranks))

    def size_for(self, tokens: TokenBatch, kv_cache: object) -> int | None:
        """The recorded size in which ``tokens`` runs; None: it must run as it is.

        A recorded step is one new token of each sequence with logits of all rows, over the cache it was recorded with.
        """
        num_rows = len(tokens.token_ids)
        if kv_cache is not self.cache or len(tokens.logit_rows) != num_rows or len(tokens.spans) != num_rows:
            return None
        if not num_rows or num_rows > self.sizes[-1] or not all(self._fits(span) for span in tokens.spans):
            return None
        has_ranks = any(span.rank is not None for span in tokens.spans)
        size = next(size for size in self.sizes if size >= num_rows)
        return size if (size, has_ranks) in self._steps else None

    @torch.inference_mode()
    def run(self, tokens: TokenBatch, size: int) -> Tensor:
        """Logits (n, vocab_size) float32 of a batch that ``size_for`` gave ``size``; the next step writes over them.

        Raises:
            ValueError: a negative rank, or a block table that is too short or names blocks that are not there.
        """
        num_rows = len(tokens.token_ids)
        for row, (token_id, span) in enumerate(zip(tokens.token_ids, tokens.spans, strict=True)):
            self._fill(row, token_id, span)
        for row in range(num_rows, size):
            self._fill_up(row)
        self._buffers.copy(size)
        step = self._steps[size, any(span.rank is not None for span in tokens.spans)]
        step.replay()
        return step.output[:num_rows]

    def _fits(self, span: SequenceSpan) -> bool:
        return span.num_tokens == 1 and span.context_len <= self._tables.shape[1] * self.cache.block_size

    def _run(self, size: int, has_ranks: bool) -> Tensor:
        """What is recorded: nothing in here may depend on a number that the device holds."""
        buffers, network = self._buffers, self._network
        token_ids, positions, slots, ranks, _ = buffers.numbers[:, :size]
        row_ranks = RowRanks(ranks, ALL_COMPONENTS) if has_ranks else None
        layout = PagedLayout(slots, buffers.rows(size), None)
        plans = {window: PagedPlan(layout, self._choice, window) for window in network.config.windows}
        batch = Batch(token_ids, positions, (), row_ranks)
        return network.logits(network.attend_by(plans, batch, self.cache))

    def _fill(self, row: int, token_id: int, span: SequenceSpan) -> None:
        position, block_size = span.context_len - 1, self.cache.block_size
        num_blocks = position // block_size + 1
        table = list((span.block_table or ())[:num_blocks])
        if len(table) < num_blocks:
            raise ValueError(f"a sequence of {span.context_len} tokens needs {num_blocks} blocks, has {len(table)}")
        self._set_table(row, table)
        rank = rank_of(span)
        slot = table[-1] * block_size + position % block_size
        self._numbers[:, row] = (token_id, position, slot, rank, span.context_len)

    def _fill_up(self, row: int) -> None:
        scratch = self.cache.num_blocks
        self._tables[row, 0] = scratch
        self._held[row] = []
        self._numbers[:, row] = (0, 0, scratch * self.cache.block_size, ALL_COMPONENTS, 1)

    def _set_table(self, row: int, table: list[int]) -> None:
        """Write the blocks that are not there yet: mostly none, or the last one."""
        held = self._held[row]
        if table == held:
            return
        if min(table) < 0 or max(table) >= self.cache.num_blocks:
            raise ValueError(f"the cache has {self.cache.num_blocks} blocks, a table is {table}")
        start = len(held) if table[: len(held)] == held else 0
        self._tables[row, start : len(table)] = table[start:]
        self._held[row] = table
