"""Packing against Python's unbounded integers: a packed row is one little-endian number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import SchemeError
from models.quant.packing import pack, packed_columns, unpack

WIDTHS = range(2, 9)


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    num_bits = draw(st.sampled_from(WIDTHS))
    num_columns = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**num_bits - 1), min_size=num_columns, max_size=num_columns)
    return num_bits, draw(st.lists(row, min_size=1, max_size=4))


def bit_stream(codes: list[int], num_bits: int) -> bytes:
    number = sum(code << (position * num_bits) for position, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * num_bits // 8), "little")


@given(code_matrices())
def test_a_packed_row_is_the_little_endian_number_that_its_codes_spell(case: tuple[int, list[list[int]]]) -> None:
    num_bits, rows = case
    packed = pack(torch.tensor(rows, dtype=torch.uint8), num_bits)
    assert [bytes(row.tolist()) for row in packed] == [bit_stream(row, num_bits) for row in rows]


@given(code_matrices())
def test_unpacking_the_number_gives_the_codes_back(case: tuple[int, list[list[int]]]) -> None:
    num_bits, rows = case
    packed = torch.tensor([list(bit_stream(row, num_bits)) for row in rows], dtype=torch.uint8)
    assert unpack(packed, num_bits, len(rows[0])).tolist() == rows


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_large_matrices_survive_the_round_trip(num_bits: int) -> None:
    codes = torch.randint(2**num_bits, (130, 1001), dtype=torch.uint8)
    packed = pack(codes, num_bits)
    assert packed.shape == (130, packed_columns(1001, num_bits))
    assert torch.equal(unpack(packed, num_bits, 1001), codes)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_strided_codes_pack_like_contiguous_ones(num_bits: int) -> None:
    codes = torch.randint(2**num_bits, (24, 16), dtype=torch.uint8)
    assert torch.equal(pack(codes.T, num_bits), pack(codes.T.contiguous(), num_bits))


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_padding_bits_are_written_as_zero_and_ignored_when_read(num_bits: int) -> None:
    codes = torch.full((1, 3), 2**num_bits - 1, dtype=torch.uint8)
    packed = pack(codes, num_bits)
    used_bits = 3 * num_bits
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == 2**used_bits - 1
    packed[0, -1] |= (0xFF << (used_bits % 8)) & 0xFF if used_bits % 8 else 0
    assert torch.equal(unpack(packed, num_bits, 3), codes)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_packing_does_not_share_memory_with_its_input(num_bits: int) -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    packed = pack(codes, num_bits)
    codes.fill_(1)
    assert not packed.any()
    unpacked = unpack(packed, num_bits, 8)
    packed.fill_(255)
    assert not unpacked.any()


@pytest.mark.parametrize("num_bits", range(2, 8))
def test_a_code_that_does_not_fit_is_refused(num_bits: int) -> None:
    with pytest.raises(SchemeError, match=f"{2**num_bits} does not fit in {num_bits} bits"):
        pack(torch.tensor([[0, 2**num_bits]], dtype=torch.uint8), num_bits)


@pytest.mark.parametrize("num_bits", [1, 9])
def test_other_widths_are_refused(num_bits: int) -> None:
    with pytest.raises(SchemeError, match="choose 2 to 8"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), num_bits)


def test_anything_but_a_byte_matrix_is_refused() -> None:
    with pytest.raises(SchemeError, match="int32"):
        pack(torch.zeros(1, 8, dtype=torch.int32), 4)
    with pytest.raises(SchemeError, match=r"\(8,\)"):
        unpack(torch.zeros(8, dtype=torch.uint8), 4, 16)


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(SchemeError, match="rows of 5 bytes do not hold 16 codes of 3 bits: expected 6"):
        unpack(torch.zeros(2, 5, dtype=torch.uint8), 3, 16)
