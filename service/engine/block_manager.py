"""Who holds which block of the paged key-value cache. Numbers only: the tensors are the cache's.

A block has as many holders as there are block tables with it. Full blocks that are computed get a key (``block_keys``)
and can be found by it, so that a request whose prompt begins alike starts behind them instead of computing them again.
A block that nobody holds any more stays findable until its memory is wanted: blocks without a key are taken first, then
those with one, from the least recently released on. A table's blocks are released from its end, and whoever holds a
block holds all those before it: so the end of a text always goes before its beginning, without which it is of no use.
"""

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16
"""Tokens per block."""


class BlockManager:
    """Blocks of the cache, by number. A request's blocks are its ``block_table``: entry i holds tokens i * size and on.

    has_prefix_cache: blocks can be found by their keys; without, each table has blocks of its own
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, *, has_prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_size} tokens cannot hold anything")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        # The most recently freed block is taken first: its memory is the likeliest to be resident and cached.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key that nobody holds, the least recently released first."""
        self._num_holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds: those that can be allocated."""
        return len(self._free) + len(self._kept)

    @property
    def num_cached_blocks(self) -> int:
        """Of those that nobody holds, the ones that are kept because they can be found."""
        return len(self._kept)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by requests; one that several hold counts once."""
        return self.num_blocks - self.num_free_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the leading ``keys``, up to the first that is not in the cache. Nothing is held by that."""
        blocks = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, num_blocks: int, found: Sequence[int] = ()) -> bool:
        """There is room for ``num_blocks`` more, when ``found`` are held as well."""
        num_kept = sum(1 for block in found if not self._num_holders[block])
        return num_blocks <= self.num_free_blocks - num_kept

    def hold(self, found: Sequence[int]) -> None:
        """One more holder for each of the blocks that ``find`` gave."""
        for block in found:
            if not self._num_holders[block]:
                del self._kept[block]
            self._num_holders[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks with one holder and no key; ask ``can_allocate`` first."""
        if num_blocks > self.num_free_blocks:
            raise ValueError(f"{num_blocks} cache blocks are asked for, {self.num_free_blocks} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def publish(self, block: int, key: bytes) -> int:
        """Make a held ``block`` findable by ``key``, now that all of its tokens are computed.

        Returns:
            The block to have in its place: the one that ``key`` finds already, if there is one, with a holder more.
        """
        other = self._found.get(key)
        if other is None:
            self._found[key] = block
            self._keys[block] = key
        elif other != block:
            self.hold([other])
            self.free([block])
            return other
        return block

    def free(self, block_table: Sequence[int]) -> None:
        """One holder less for each block; those with a key stay findable."""
        wrong = sorted(block for block in block_table if not self._num_holders[block])
        if wrong:
            raise ValueError(f"cache blocks {wrong} are freed but not in use")
        for block in reversed(block_table):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def forget(self, block_table: Sequence[int]) -> None:
        """Held blocks that nobody shall find any more, because what they hold is not to be trusted."""
        for block in block_table:
            self._drop_key(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        self._drop_key(block)
        return block

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._found[key]
            self._keys[block] = None
