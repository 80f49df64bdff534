"""Who holds which block of the paged key-value cache. Numbers only: the tensors are the cache's."""

from collections.abc import Sequence

BLOCK_SIZE = 16
"""Tokens per block."""


class BlockManager:
    """A free list of cache blocks. A request's blocks are its ``block_table``: entry i holds tokens i * size and on."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_size} tokens cannot hold anything")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The most recently freed block is taken first: its memory is the likeliest to be resident and cached.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by requests."""
        return len(self._used)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """There is room for ``num_tokens`` more tokens of one request."""
        return self.num_blocks_for(num_tokens) <= self.num_free_blocks

    def allocate(self, num_tokens: int) -> list[int]:
        """A block table for ``num_tokens`` tokens; ask ``can_allocate`` first."""
        num_blocks = self.num_blocks_for(num_tokens)
        if num_blocks > self.num_free_blocks:
            raise ValueError(f"{num_blocks} cache blocks are asked for, {self.num_free_blocks} are free")
        block_table = [self._free.pop() for _ in range(num_blocks)]
        self._used.update(block_table)
        return block_table

    def free(self, block_table: Sequence[int]) -> None:
        """Take the blocks back."""
        if not self._used.issuperset(block_table):
            raise ValueError(f"cache blocks {sorted(set(block_table) - self._used)} are freed but not in use")
        self._used.difference_update(block_table)
        self._free.extend(reversed(block_table))
