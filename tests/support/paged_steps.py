"""Steps over a paged cache in the engine's words: sequences with scattered blocks, and batches of their next tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.kernels.paged import PagedLayer, PagedRows
from models.llama.batch import SequenceSpan, TokenBatch
from models.llama.kv_cache import PagedKVCache

BLOCK = 16


@dataclass
class PagedSequence:
    """One text being computed: its blocks, and how many of its tokens are done."""

    tokens: list[int]
    block_table: list[int]
    num_done: int = 0
    rank: int | None = None

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_done


def scattered(texts: Sequence[Sequence[int]], num_blocks: int, seed: int = 0) -> list[PagedSequence]:
    """Sequences whose blocks lie in no order, and none in two of them."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    sequences = []
    for text in texts:
        count = -(-len(text) // BLOCK)
        sequences.append(PagedSequence(list(text), [order.pop() for _ in range(count)]))
    return sequences


def next_tokens(step: Sequence[tuple[PagedSequence, int]], all_rows: bool = True) -> TokenBatch:
    """The next so many tokens of each sequence, with logits of every row or of each sequence's last; advances them."""
    tokens = TokenBatch([], [], [])
    for sequence, count in step:
        start = len(tokens.token_ids)
        end = sequence.num_done + count
        tokens.token_ids.extend(sequence.tokens[sequence.num_done : end])
        tokens.spans.append(SequenceSpan(start, count, end, None, sequence.block_table, sequence.rank))
        tokens.logit_rows.extend(range(start if all_rows else start + count - 1, start + count))
        sequence.num_done = end
    return tokens


def fill_with_nan(cache: PagedKVCache) -> None:
    """So that reading a slot that nobody wrote shows."""
    for index in range(len(cache._keys.codes)):
        layer = cache.layer(index)
        for tensor in (layer.keys, layer.values):
            tensor.fill_(float("nan"))


@dataclass
class PagedCase:
    """Random keys, values and queries of some sequences, in blocks that lie in no order.

    dense: per sequence, (context, num_kv_heads, head_dim) float64 keys and values as they are read back
    """

    query: torch.Tensor
    layer: PagedLayer
    rows: PagedRows
    dense: list[tuple[torch.Tensor, torch.Tensor]]


def paged_case(
    contexts: Sequence[int],
    num_rows: Sequence[int],
    *,
    group: int = 1,
    kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    is_int8: bool = False,
    spread: float = 1.0,
) -> PagedCase:
    """Slots that no sequence holds are NaN, or of 8 bits have scales that are."""
    generator = torch.Generator().manual_seed(sum(contexts) + group + head_dim)
    counts = [-(-context // BLOCK) for context in contexts]
    num_slots = (sum(counts) + 3) * BLOCK
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables = torch.full((len(contexts), max(counts)), order[-1], dtype=torch.int32)
    keys, values = (torch.full((num_slots, kv_heads, head_dim), float("nan")) for _ in range(2))
    used = []
    for table, count, context in zip(tables, counts, contexts, strict=True):
        table[:count] = torch.tensor([order.pop(0) for _ in range(count)])
        slots = (table[:count, None].long() * BLOCK + torch.arange(BLOCK)).flatten()[:context]
        for tensor in (keys, values):
            tensor[slots] = torch.randn(context, kv_heads, head_dim, generator=generator) * spread
        used.append(slots)
    if is_int8:
        scales = [tensor.abs().amax(-1, keepdim=True) / 127 for tensor in (keys, values)]
        codes = [
            torch.where(tensor.isnan(), 7, tensor / scale).round().to(torch.int8)
            for tensor, scale in zip((keys, values), scales, strict=True)
        ]
        layer = PagedLayer(codes[0], codes[1], scales[0], scales[1], BLOCK)
        read = [code.double() * scale.double() for code, scale in zip(codes, scales, strict=True)]
    else:
        layer = PagedLayer(keys.to(dtype), values.to(dtype), None, None, BLOCK)
        read = [layer.keys.double(), layer.values.double()]
    starts = [sum(num_rows[:index]) for index in range(len(num_rows))]
    lengths = [torch.tensor(numbers, dtype=torch.int32) for numbers in (starts, num_rows, contexts)]
    query = torch.randn(sum(num_rows), kv_heads * group, head_dim, generator=generator).to(dtype)
    rows = PagedRows(*lengths, tables, max(num_rows))
    return PagedCase(query, layer, rows, [(read[0][slots], read[1][slots]) for slots in used])
