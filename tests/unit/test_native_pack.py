"""Packed strips, read back by the description in the C header."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import KernelError
from models.kernels.native.embedding import EmbeddingTable
from models.kernels.native.factors import ByteCodes, byte_factors, to_bytes
from models.kernels.native.pack import CodedMatrix, PackedMatrix, pack_dense, pack_linear, pack_matrix, widest_block
from models.quant.grid import dequantize
from models.quant.packing import pack
from models.quant.rtn import quantize_rtn
from models.scheme import QuantScheme
from tests.support.linear_oracle import random_layer
from tests.support.native import needs_native, runtime

pytestmark = needs_native

STRIP_ROWS = 32


@dataclass(frozen=True)
class Blocks:
    """codes (rows, channels) int; scale, zero (rows, groups): float64, int."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def values(self, multiplier: float) -> Tensor:
        groups = self.codes.reshape(*self.scale.shape, -1) - self.zero[..., None]
        return (groups.double() * self.scale[..., None] * multiplier).flatten(1)


def unpack_lines(data: np.ndarray, bits: int, channels: int) -> np.ndarray:
    """(32, channels): lines of 64 bytes for rows 0..15 and 16..31 in turn, fields of ``bits`` lowest first."""
    fields = 8 // bits
    codes = np.zeros((STRIP_ROWS, channels), dtype=np.int64)
    for line in range(len(data) // 64):
        step, half = divmod(line, 2)
        for position in range(64):
            row, j = divmod(position, 4)
            for field in range(fields):
                code = data[64 * line + position] >> (bits * field) & ((1 << bits) - 1)
                codes[16 * half + row, step * 4 * fields + 4 * field + j] = code
    return codes


def read_run(data: np.ndarray, matrix: PackedMatrix, *, is_low_rank: bool) -> Blocks:
    """The blocks of one strip's share of the weight or of its low-rank term."""
    struct = matrix.struct
    bits, block = (8, 32) if is_low_rank else (struct.storage_bits, struct.block)
    channels = -(-struct.rank // 32) * 32 if is_low_rank else struct.in_features
    group = 32 if is_low_rank else block * struct.blocks_per_group
    has_zeros = bool(struct.has_zero_points) and not is_low_rank
    codes, scales, zeros, at = [], [], [], 0
    for _ in range(channels // group):
        scales.append(data[at : at + 64].view(np.float16).astype(np.float64))
        at += 64
        zero = np.full(STRIP_ROWS, 128 if is_low_rank else struct.zero)
        if has_zeros:
            zero, at = data[at : at + 64].view(np.int16), at + 64
        zeros.append(zero.astype(np.int64))
        size = STRIP_ROWS * group * bits // 8
        codes.append(unpack_lines(data[at : at + size], bits, group))
        at += size
    assert at == len(data)
    stacked = (np.concatenate(codes, 1), np.stack(scales, 1), np.stack(zeros, 1))
    return Blocks(*(torch.from_numpy(values) for values in stacked))


def read_back(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Weight (out_features, in_features) and lora_up (out_features, rank up to a multiple of 32), float64."""
    struct = matrix.struct
    strips = matrix.strips.numpy().reshape(-1, struct.strip_bytes)
    low_rank_bytes = -(-struct.rank // 32) * (64 + STRIP_ROWS * 32)
    main, up = [], []
    for strip in strips:
        end = len(strip) - low_rank_bytes
        main.append(read_run(strip[:end], matrix, is_low_rank=False).values(struct.multiplier))
        if struct.rank:
            up.append(read_run(strip[end:], matrix, is_low_rank=True).values(struct.up_multiplier))
    rows = struct.out_features
    return torch.cat(main)[:rows], torch.cat(up)[:rows] if up else torch.empty(rows, 0)


@st.composite
def layers(draw):
    scheme = draw(
        st.one_of(
            st.builds(QuantScheme, st.integers(2, 8), st.sampled_from((-1, 32, 64, 96)), st.booleans()),
            st.builds(QuantScheme, st.integers(2, 8), st.just(32), st.just(True), st.just("mxint")),
        )
    )
    in_features = 192 if scheme.group_size != -1 else draw(st.sampled_from((32, 64, 96)))
    rank = draw(st.sampled_from((0, 1, 31, 32, 33)))
    variant = "serq" if rank <= in_features and draw(st.booleans()) else ""
    return scheme, (draw(st.integers(1, 70)), in_features), rank, variant


@settings(deadline=None, max_examples=40)
@given(layers())
def test_strips_read_back_by_their_description_are_the_weight_and_its_correction(layer) -> None:
    scheme, shape, rank, variant = layer
    weights = random_layer(scheme, shape, rank, variant, has_bias=True)
    block = widest_block(shape[1], scheme.group_length(shape[1]))
    assert block is not None
    matrix = pack_linear(runtime(), weights, block)
    weight, up = read_back(matrix)
    assert torch.equal(weight, dequantize(weights.quantized).double())
    assert matrix.strips.data_ptr() % 64 == 0
    assert matrix.bias is not None
    assert torch.equal(matrix.bias, weights.bias)
    if rank:
        factors = byte_factors(weights.correction, block)
        assert torch.equal(up, factors.lora_up.values().double())
        if factors.lora_down is not None:
            assert matrix.down is not None
            assert torch.equal(read_back(matrix.down)[0], factors.lora_down.values().double())


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 40))
def test_rows_of_bits_and_bytes_pack_to_the_same(num_bits: int, is_symmetric: bool, num_rows: int) -> None:
    quantized = quantize_rtn(torch.randn(num_rows, 128), QuantScheme(num_bits, 64, is_symmetric))
    unpacked = CodedMatrix.of(quantized)
    bits = CodedMatrix(pack(quantized.codes, num_bits), 128, num_bits, quantized.scale, quantized.zero_point)
    first, second = (pack_matrix(runtime(), coded, 64) for coded in (unpacked, bits))
    assert bits.codes.nbytes == num_rows * 128 * num_bits // 8
    assert torch.equal(first.strips, second.strips)


def test_narrow_blocks_read_the_same_memory() -> None:
    weights = random_layer(QuantScheme(4, 64), (40, 192), 40)
    wide = pack_linear(runtime(), weights, 64)
    narrow = wide.narrowed(32)
    assert narrow.strips is wide.strips
    assert (wide.block, narrow.block) == (64, 32)
    assert all(map(torch.equal, read_back(wide), read_back(narrow)))
    assert wide.down is not None
    assert narrow.down is not None
    assert narrow.down.block == 32
    assert torch.equal(read_back(wide.down)[0], read_back(narrow.down)[0])


@pytest.mark.parametrize("exponent", [-120, -60, -20, 0, 40, 100])
def test_scales_beyond_float16_keep_their_bits(exponent: int) -> None:
    # codes -127..127 with exact scales of eleven bits: nothing is lost whatever the power of two on top
    scale = torch.ldexp(torch.randint(1024, 2048, (8, 2)).float(), torch.tensor(exponent - 10))
    values = ByteCodes(torch.randint(1, 256, (8, 64), dtype=torch.uint8), scale)
    weight, _ = read_back(pack_matrix(runtime(), CodedMatrix.of_bytes(values), 32))
    assert torch.equal(weight, values.values().double())


@pytest.mark.parametrize("width", [32, 64, 96, 160])
def test_a_dense_weight_loses_half_a_percent_in_eight_bits(width: int) -> None:
    weight = torch.randn(300, width)
    matrix = pack_dense(runtime(), weight.bfloat16())
    assert matrix.block == (64 if width % 64 == 0 else 32)
    error = read_back(matrix)[0] - weight.bfloat16().double()
    assert 0 < float(error.norm()) < 0.008 * float(weight.norm())


def test_a_block_of_zeros_stays_zero() -> None:
    values = torch.randn(4, 96)
    values[:, 32:64] = 0
    assert not to_bytes(values, 32).values()[:, 32:64].any()
    assert to_bytes(values, 32).values()[:, :32].all()


def test_what_cannot_be_packed_is_refused_with_the_reason() -> None:
    codes = torch.zeros(4, 48, dtype=torch.uint8)
    with pytest.raises(KernelError, match="cannot pack this weight: in_features must be a multiple of 32"):
        pack_matrix(runtime(), CodedMatrix(codes, 48, 4, torch.ones(4, 1)), 32)


@pytest.mark.parametrize(
    ("lengths", "block"),
    [((64, 192), 64), ((96, 192), 32), ((160,), 32), ((64, 96), 32), ((16, 64), None), ((80,), None)],
)
def test_a_block_never_crosses_a_group(lengths: tuple[int, ...], block: int | None) -> None:
    assert widest_block(*lengths) == block


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (QuantScheme(8, 64, True), torch.int8),
        (QuantScheme(4, 32), torch.int8),
        (QuantScheme(7, -1), torch.int8),
        (QuantScheme(6, 32, format="mxint"), torch.int8),
        (QuantScheme(8, 64), torch.float16),
        (QuantScheme(4, 64, format="nf4"), torch.float16),
    ],
    ids=str,
)
def test_a_quantized_embedding_becomes_signed_bytes_where_they_hold_it(scheme: QuantScheme, dtype: torch.dtype) -> None:
    quantized = quantize_rtn(torch.randn(5000, 64), scheme)
    table = EmbeddingTable.of(quantized)
    assert table.rows.dtype == dtype
    values = table.rows.float()
    if table.scale is not None:
        values = (values.view(*table.scale.shape, -1) * table.scale[..., None]).flatten(1)
        assert torch.equal(values, dequantize(quantized))
    else:
        assert torch.equal(table.rows, dequantize(quantized).half())


def test_a_dense_embedding_is_kept_as_it_is() -> None:
    weight = torch.randn(7, 32).bfloat16()
    table = EmbeddingTable.of(weight)
    assert table.rows.data_ptr() == weight.data_ptr()
    assert table.nbytes == weight.nbytes
