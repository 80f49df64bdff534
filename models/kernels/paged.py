"""What attention over the paged key-value cache takes, whichever kernel runs it: tensors of the device, nothing else.

A launch depends on the shapes of these tensors only. Lengths, tables and rows are read on the device, so that a launch
that was recorded once serves every later step of the same shape.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_FEW_ROWS = 8
"""New rows of one sequence that the paged kernels take: a decode's one, or a short draft's."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A few new rows of each of n sequences, the last of what they see, and the blocks that hold all of that.

    row_starts:   (n,) int32, a sequence's first row in the batch
    num_rows:     (n,) int32, 1 to ``max_rows``
    context_lens: (n,) int32, tokens of the sequence, the new ones included
    block_tables: (n, width) int32, cache blocks in order; entries beyond a context are not read
    max_rows:     no sequence has more rows
    """

    row_starts: Tensor
    num_rows: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_rows: int

    @property
    def num_sequences(self) -> int:
        """n."""
        return self.block_tables.shape[0]


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """Keys and values of one layer: a block is ``block_size`` neighbouring slots.

    keys, values: (num_slots, num_kv_heads, head_dim), of a float type or int8
    key_scales, value_scales: (num_slots, num_kv_heads, 1) float32 by which to multiply them; None: they are as they are
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    block_size: int


class PagedAttention(Protocol):
    """Attention of few rows of each sequence over the cache."""

    @property
    def name(self) -> str:
        """Short name, as shown to the user."""
        ...

    def __call__(self, query: Tensor, layer: PagedLayer, rows: PagedRows, window: int | None, output: Tensor) -> None:
        """Attend.

        Args:
            query: (num_tokens, num_heads, head_dim), rotated; rows that ``rows`` does not name are left alone.
            layer: keys and values, those of the new rows included.
            rows: which rows see what.
            window: tokens that a row sees at most, itself included; None: all.
            output: (num_tokens, num_heads, head_dim), dtype of ``query``: receives the rows' results.
        """
        ...


class TorchPagedAttention:
    """The specification, on every device: gathers whole tables, masks, and sums in float32.

    It reads as many slots as the tables are wide, whatever the contexts.
    """

    name = "torch"

    def __call__(self, query: Tensor, layer: PagedLayer, rows: PagedRows, window: int | None, output: Tensor) -> None:
        """See ``PagedAttention``."""
        num_heads, num_kv_heads = query.shape[1], layer.keys.shape[1]
        places = torch.arange(rows.block_tables.shape[1] * layer.block_size, device=query.device)
        slots = rows.block_tables.long().repeat_interleave(layer.block_size, 1) * layer.block_size
        slots = slots + places % layer.block_size
        # Beyond the context a table may hold anything: its first slot stands in, and is masked.
        slots = torch.where(places < rows.context_lens[:, None], slots, slots[:, :1])
        keys, values = (_gather(*part, slots) for part in _parts(layer))
        for offset in range(rows.max_rows):
            positions = rows.context_lens - rows.num_rows + offset
            # A sequence with fewer rows computes its last one again.
            index = (rows.row_starts + torch.clamp(rows.num_rows - 1, max=offset)).long()
            positions = torch.minimum(positions, rows.context_lens - 1)[:, None]
            is_seen = places <= positions
            if window is not None:
                is_seen &= places > positions - window
            grouped = query.index_select(0, index).float().view(len(index), num_kv_heads, num_heads // num_kv_heads, -1)
            scores = torch.einsum("nhgd,nthd->nhgt", grouped, keys) * query.shape[2] ** -0.5
            weights = scores.masked_fill(~is_seen[:, None, None], float("-inf")).softmax(-1)
            attended = torch.einsum("nhgt,nthd->nhgd", weights, values).flatten(1, 2)
            output.index_copy_(0, index, attended.to(output.dtype))


def _parts(layer: PagedLayer) -> tuple[tuple[Tensor, Tensor | None], ...]:
    return (layer.keys, layer.key_scales), (layer.values, layer.value_scales)


def _gather(codes: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """(n, t, num_kv_heads, head_dim) float32 at ``slots`` (n, t)."""
    values = codes.index_select(0, slots.flatten()).float()
    if scales is not None:
        values = values * scales.index_select(0, slots.flatten())
    return values.view(*slots.shape, *codes.shape[1:])
