"""Formats of other engines, against hand-made vectors and the libraries that define them."""

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ExportError
from models.export import bnb, unpack
from models.export.compressed_tensors import packed_tensors, signed_tensors
from models.export.gguf_blocks import code_blocks, holds_exactly, smallest_exact
from models.export.gptq import gptq_tensors
from models.quant.grid import dequantize
from models.scheme import PER_CHANNEL, QuantScheme
from models.types import QuantizedWeight
from tests.support.artifact_builder import random_codes

INTEGERS = [
    QuantScheme(bits, group, is_symmetric=symmetric)
    for bits in range(2, 9)
    for group in (PER_CHANNEL, 32, 64)
    for symmetric in (True, False)
]
GGUF_KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def signed(codes: list[int], num_bits: int) -> QuantizedWeight:
    """A symmetric weight of one row with scale 1, from signed integers."""
    unsigned = torch.tensor([codes], dtype=torch.int16) + (1 << (num_bits - 1))
    scheme = QuantScheme(num_bits, PER_CHANNEL, is_symmetric=True)
    return QuantizedWeight(unsigned.to(torch.uint8), torch.ones(1, 1, dtype=torch.float16), None, scheme)


def stripped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("p."): tensor for name, tensor in tensors.items()}


GOLDEN = [
    (4, [-8, -7, -1, 0, 1, 3, 6, 7], [0xFEB98710]),
    (3, [index % 8 - 4 for index in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    (8, [-128, -1, 0, 127], [0xFF807F00]),
    (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4]),
]


@pytest.mark.parametrize(("num_bits", "values", "words"), GOLDEN)
def test_writer_packs_the_golden_words(num_bits: int, values: list[int], words: list[int]) -> None:
    packed = packed_tensors("p", signed(values, num_bits), torch.float16)["p.weight_packed"]
    assert [int(word) & 0xFFFFFFFF for word in packed[0]] == words


@pytest.mark.parametrize(("num_bits", "values", "words"), GOLDEN)
def test_unpacker_reads_the_golden_words(num_bits: int, values: list[int], words: list[int]) -> None:
    tensor = torch.tensor([np.array(words, dtype=np.uint32).view(np.int32).tolist()], dtype=torch.int32)
    fields = unpack.fields_of_words(tensor, num_bits, len(values))
    assert (fields - (1 << (num_bits - 1))).tolist() == [values]


@given(
    num_bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_codes_come_back_from_words(num_bits: int, rows: int, columns: int, symmetric: bool, seed: int) -> None:
    scheme = QuantScheme(num_bits, PER_CHANNEL, is_symmetric=symmetric)
    weight = random_codes(rows, columns, scheme, torch.Generator().manual_seed(seed))
    tensors = stripped(packed_tensors("p", weight, torch.float16))
    assert tensors["weight_packed"].shape == (rows, -(-columns * num_bits // 32))
    assert torch.equal(unpack.compressed_weight(tensors, num_bits), dequantize(weight).double())


@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
def test_compressed_tensors_itself_reads_what_is_written(scheme: QuantScheme) -> None:
    weight = random_codes(48, 128, scheme, generator())
    tensors = stripped(packed_tensors("p", weight, torch.float16))
    bits, middle = scheme.num_bits, 1 << (scheme.num_bits - 1)
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(tensors["weight_shape"].tolist()))
    assert torch.equal(codes.to(torch.int16) + middle, weight.codes.to(torch.int16))
    if weight.zero_point is not None:
        shape = weight.zero_point.shape
        zeros = unpack_from_int32(tensors["weight_zero_point"], bits, shape, packed_dim=0)
        assert torch.equal(zeros.to(torch.int16) + middle, weight.zero_point.to(torch.int16))
    assert torch.equal(unpack.compressed_weight(tensors, bits), dequantize(weight).double())


def test_int_quantized_holds_signed_values() -> None:
    scheme = QuantScheme(8, PER_CHANNEL, is_symmetric=True)
    weight = random_codes(8, 64, scheme, generator())
    tensors = stripped(signed_tensors("p", weight, torch.float16))
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(unpack.signed_weight(tensors), dequantize(weight).double())


def test_a_scale_that_becomes_zero_is_refused() -> None:
    weight = signed([0, 1], 4)
    tiny = QuantizedWeight(weight.codes, torch.tensor([[2.0**-30]], dtype=torch.bfloat16), None, weight.scheme)
    with pytest.raises(ExportError, match=r"p\.weight_scale: a scale is below.*bfloat16"):
        packed_tensors("p", tiny, torch.float16)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_gptq_packs_down_the_columns_and_stores_zero_points_less_one(num_bits: int) -> None:
    weight = random_codes(16, 64, QuantScheme(num_bits, 32, is_symmetric=True), generator())
    tensors = stripped(gptq_tensors("p", weight))
    per_word = 32 // num_bits
    first = sum(int(weight.codes[5, index]) << (num_bits * index) for index in range(per_word))
    assert int(tensors["qweight"][0, 5]) & 0xFFFFFFFF == first
    assert {int(word) & 0xFFFFFFFF for word in tensors["qzeros"].flatten()} == {
        0x77777777 if num_bits == 4 else 0x7F7F7F7F
    }
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert torch.equal(unpack.gptq_weight(tensors, num_bits), dequantize(weight).double())


def test_nf4_has_the_first_code_in_the_upper_half() -> None:
    weight = random_codes(4, 64, QuantScheme(format="nf4", group_size=64), generator())
    tensors = stripped(bnb.nf4_tensors("p", weight, "float32"))
    assert int(tensors["weight"][0, 0]) == int(weight.codes[0, 0]) * 16 + int(weight.codes[0, 1])
    assert tensors["weight.absmax"].shape == (4,)
    torch.testing.assert_close(unpack.nf4_weight(tensors), dequantize(weight).double())


EXACT_BLOCKS = [(kind, scheme) for kind in GGUF_KINDS for scheme in INTEGERS if holds_exactly(kind, scheme, 128)]


@pytest.mark.parametrize(("kind", "scheme"), EXACT_BLOCKS, ids=str)
def test_gguf_blocks_hold_exactly_what_they_are_said_to(kind: Kind, scheme: QuantScheme) -> None:
    weight = random_codes(6, 128, scheme, generator())
    assert np.array_equal(gguf.quants.dequantize(code_blocks(weight, kind), kind), dequantize(weight).numpy())


@pytest.mark.parametrize(
    ("num_bits", "symmetric", "kind"),
    [
        (2, True, Kind.Q4_0),
        (3, False, Kind.Q4_0),
        (4, True, Kind.Q4_0),
        (4, False, Kind.Q5_0),
        (5, True, Kind.Q5_0),
        (5, False, Kind.Q8_0),
        (7, False, Kind.Q8_0),
        (8, True, Kind.Q8_0),
        (8, False, None),
    ],
)
def test_smallest_exact_type_spans_the_differences(num_bits: int, symmetric: bool, kind: Kind | None) -> None:
    assert smallest_exact(QuantScheme(num_bits, 32, is_symmetric=symmetric), 128) == kind


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 16), QuantScheme(format="nf4", group_size=32), QuantScheme(format="mxfp4", group_size=32)]
)
def test_groups_that_cut_blocks_and_tables_fit_no_type(scheme: QuantScheme) -> None:
    assert smallest_exact(scheme, 128) is None


def test_asymmetric_codes_in_q4_1_are_off_by_the_rounding_of_their_beginning() -> None:
    weight = random_codes(6, 128, QuantScheme(4, 32), generator())
    found = torch.from_numpy(gguf.quants.dequantize(code_blocks(weight, Kind.Q4_1), Kind.Q4_1).copy())
    assert weight.zero_point is not None
    beginning = (weight.scale.float() * weight.zero_point).repeat_interleave(32, dim=1)
    assert bool(((found - dequantize(weight)).abs() <= beginning * 2.0**-11 + 1e-7).all())
