"""Memory for packed weights: pieces lie side by side, apart from each other, and live as long as their tensors."""

import gc

import pytest
import torch

from models.kernels.native.memory import WeightMemory
from models.kernels.native.structs import ALIGNMENT

LARGE = 40 << 20


def test_pieces_start_on_cache_lines_one_behind_the_other() -> None:
    """A step reads weights in the order in which they were packed."""
    memory = WeightMemory()
    sizes = [1, 64, 65, 1088 * 9, 0, 7]
    pieces = [memory.take(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    assert all(piece.data_ptr() % ALIGNMENT == 0 for piece in pieces if len(piece))
    starts = [piece.data_ptr() - pieces[0].data_ptr() for piece in pieces if len(piece)]
    assert starts == [0, 64, 128, 256, 256 + 1088 * 9]


def test_pieces_share_no_byte_and_begin_as_zeros() -> None:
    """Whoever writes one piece changes no other."""
    memory = WeightMemory()
    pieces = [memory.take(size) for size in (100, 3000, 5)]
    for index, piece in enumerate(pieces):
        assert not piece.any()
        piece.fill_(index + 1)
    assert [piece.unique().tolist() for piece in pieces] == [[1], [2], [3]]


@pytest.mark.parametrize("before", [0, 1000, 20 << 20])
def test_a_piece_larger_than_what_is_left_starts_anew(before: int) -> None:
    """The first and the last byte are there."""
    memory = WeightMemory()
    first = memory.take(before)
    large = memory.take(LARGE)
    large[0], large[-1] = 7, 9
    assert len(large) == LARGE
    assert not first.any()


def test_memory_outlives_the_one_who_gave_it() -> None:
    """Weights stay when the kernels' runtime goes."""
    memory = WeightMemory()
    piece = memory.take(1000).fill_(3)
    memory.take(LARGE)
    del memory
    gc.collect()
    assert torch.equal(piece, torch.full((1000,), 3, dtype=torch.uint8))
