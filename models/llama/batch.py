"""The input of one forward pass: the tokens of several sequences, concatenated without padding."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import RowRanks

ALL_COMPONENTS = (1 << 31) - 1
"""Rank of a row that gets all of every correction: more than any has."""


class SequenceSpan(NamedTuple):
    """One sequence's share of a batch.

    start, num_tokens: rows ``start .. start + num_tokens`` of the batch are this sequence's new tokens
    context_len:       tokens of the sequence that are known after this pass, the new ones included
    slots:             (context_len,) int64 key-value cache slots of all of them, in order; None: no cache,
                       then context_len == num_tokens, or one that takes block tables
    block_table:       cache blocks of all of them, in order, and maybe more; None: no cache, or one that takes slots
    rank:              leading components of every correction that count in its rows, from 0; None: all
    """

    start: int
    num_tokens: int
    context_len: int
    slots: Tensor | None = None
    block_table: Sequence[int] | None = None
    rank: int | None = None


def ranks_of_rows(spans: Sequence[SequenceSpan]) -> "array[int] | None":
    """Each row's rank, 32-bit integers, ``ALL_COMPONENTS`` where a span leaves it open; None: all of them do.

    Raises:
        ValueError: a negative rank.
    """
    if all(span.rank is None for span in spans):
        return None
    ranks = array("i")
    for span in spans:
        ranks.extend([rank_of(span)] * span.num_tokens)
    return ranks


def rank_of(span: SequenceSpan) -> int:
    """The rank of its rows, ``ALL_COMPONENTS`` where it leaves it open.

    Raises:
        ValueError: a negative rank.
    """
    rank = ALL_COMPONENTS if span.rank is None else min(span.rank, ALL_COMPONENTS)
    if rank < 0:
        raise ValueError(f"a sequence cannot have {rank} components of a correction")
    return rank


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of one forward pass.

    token_ids, positions: (num_tokens,) int64; positions as the spans tell them: each row's place in its sequence
    spans:                one per sequence, in row order, covering every row
    row_ranks:            how much of each correction every row gets, where spans do not say it; None: all
    """

    token_ids: Tensor
    positions: Tensor
    spans: tuple[SequenceSpan, ...]
    row_ranks: RowRanks | None = None

    def __post_init__(self) -> None:
        if ranks := ranks_of_rows(self.spans):
            per_row = torch.tensor(ranks, dtype=torch.int64)
            object.__setattr__(self, "row_ranks", RowRanks(per_row.to(self.token_ids.device), max(ranks)))

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return self.token_ids.shape[0]

    @property
    def slot_mapping(self) -> Tensor:
        """(num_tokens,) int64: the cache slot into which each row's key and value are written."""
        return torch.cat([span.slots[-span.num_tokens :] for span in self.spans if span.slots is not None])

    @classmethod
    def uncached(cls, sequences: Sequence[Sequence[int]] | Tensor, device: torch.device | str = "cpu") -> "Batch":
        """Whole sequences from their first token on, without a cache: calibration and evaluation.

        Args:
            sequences: token ids of each sequence, lengths may differ; or a tensor (num_sequences, length).
            device: where the batch's tensors go.
        """
        rows = [torch.as_tensor(tokens, dtype=torch.int64) for tokens in sequences]
        spans, start = [], 0
        for row in rows:
            spans.append(SequenceSpan(start, len(row), len(row)))
            start += len(row)
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        return cls(torch.cat(rows).to(device), positions.to(device), tuple(spans))


class TokenBatch(NamedTuple):
    """One step of generation in plain numbers, which each network turns into what it computes with.

    token_ids:  of all rows
    spans:      one per sequence, in row order, covering every row; positions follow from them
    logit_rows: rows whose logits are wanted, ascending
    """

    token_ids: list[int]
    spans: list[SequenceSpan]
    logit_rows: list[int]

    def tensors(self, device: torch.device) -> tuple[Batch, Tensor]:
        """The batch on ``device``, and ``logit_rows`` (n,) int64."""
        positions: list[int] = []
        for span in self.spans:
            positions += range(span.context_len - span.num_tokens, span.context_len)
        # One buffer and one copy to the device; a list of Python integers is read faster by array than by torch.
        numbers = array("q", self.token_ids + positions + self.logit_rows)
        on_device = torch.frombuffer(numbers, dtype=torch.int64).to(device)
        num_tokens = len(self.token_ids)
        batch = Batch(on_device[:num_tokens], on_device[num_tokens : 2 * num_tokens], tuple(self.spans))
        return batch, on_device[2 * num_tokens :]
