"""Bytes and operations of the roofline against counts of tensors that are really made; the tables in the document."""

import pytest
import torch
import torch.nn.functional as F

from models.bench.cards import CARDS, TABLED, card_named, card_of
from models.bench.contenders import random_linear
from models.bench.roofline import (
    BATCH_SIZES,
    JOINED,
    NETWORKS,
    SCHEMES,
    W4A8,
    W4A16,
    Cost,
    LayerCost,
    Shape,
    network_shapes,
    num_bytes,
    operations,
    seconds,
)
from models.quant.factors import store_factors
from models.quant.packing import pack
from tools import roofline as tool

CPU = torch.device("cpu")
SMALL = Shape("test", "q", 192, 128)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_a_layer_are_those_of_its_packed_tensors(scheme):
    quantized = random_linear(SMALL, scheme, 0, CPU).quantized
    stored = bytes_of(pack(quantized.codes, scheme.weight_bits), quantized.scale)
    assert LayerCost(SMALL, scheme, 1).weight_bytes == stored


@pytest.mark.parametrize(("factor_dtype", "bits"), [("bfloat16", 16), ("int8", 8)])
def test_bytes_of_factors_are_those_that_are_stored(factor_dtype, bits):
    stored = store_factors(torch.randn(192, 32), torch.randn(32, 128), factor_dtype)
    assert LayerCost(SMALL, W4A16, 1, 32, bits).factor_bytes * 8 == stored.num_stored_bits


def test_operations_and_bytes_without_fusing_are_those_of_the_products():
    x, weight = torch.randn(5, 128), torch.randn(192, 128)
    up, down = torch.randn(192, 32), torch.randn(32, 128)
    count = 0

    def product_of(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 2 * len(rows) * matrix.numel()
        return F.linear(rows, matrix)

    reduced, product = product_of(x, down), product_of(x, weight)
    term = product_of(reduced, up)
    cost = LayerCost(SMALL, W4A16, 5)
    assert operations(cost.unfused) == operations(cost.fused) == count
    halves = [tensor.bfloat16() for tensor in (x, reduced, product, term, up, down)]
    x, reduced, product, term, up, down = halves
    moved = bytes_of(x, product) + bytes_of(x, down, reduced) + bytes_of(reduced, up, term)
    moved += bytes_of(product, term, product)
    assert num_bytes(cost.unfused) == cost.weight_bytes + moved
    assert num_bytes(cost.fused) == cost.weight_bytes + bytes_of(x, product, down, up, reduced, reduced)


def test_activations_are_rounded_once_and_read_as_bytes():
    rounding, product = LayerCost(SMALL, W4A8, 5, rank=0).plain
    assert rounding.num_bytes == 5 * 128 * 3 + 5 * 4
    assert product.num_bytes == LayerCost(SMALL, W4A8, 5).weight_bytes + 5 * 128 + 5 * 192 * 2
    assert (product.operations16, product.operations8) == (0, 2 * 5 * 128 * 192)


def test_a_kernel_takes_as_long_as_the_scarcer_of_memory_and_cores():
    card = card_named("A100 80GB SXM")
    assert Cost(card.bandwidth, card.bf16 / 2).seconds(card) == 1
    assert Cost(card.bandwidth / 2, card.bf16, card.int8).seconds(card) == 2


@pytest.mark.parametrize("num_rows", BATCH_SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fusing_never_costs_more(scheme, num_rows):
    for shape in network_shapes():
        cost = LayerCost(shape, scheme, num_rows)
        assert num_bytes(cost.plain) < num_bytes(cost.fused) < num_bytes(cost.unfused)
        for name in TABLED:
            assert seconds(cost.fused, card_named(name)) < seconds(cost.unfused, card_named(name))


def joined_at_4096() -> list[Shape]:
    return [it for it in network_shapes(JOINED) if 4096 in {it.in_features, it.out_features}]


def test_at_rank_32_the_fused_term_of_8_bit_factors_is_below_5_percent_of_a_4096_wide_layer():
    shapes = joined_at_4096()
    assert {shape.network for shape in shapes} == {"LLaMA-2-7B", "LLaMA-3-8B"}
    for shape in shapes:
        cost = LayerCost(shape, W4A16, 1, 32, 8)
        assert num_bytes(cost.fused) - num_bytes(cost.plain) < 0.05 * cost.weight_bytes


def test_with_16_bit_factors_that_holds_for_wide_layers_and_for_a_decoder_layer_but_not_for_square_ones():
    (square,) = [it for it in joined_at_4096() if (it.network, it.name) == ("LLaMA-2-7B", "o")]
    assert 0.058 < LayerCost(square, W4A16, 1).factor_share < 0.059
    for shape in joined_at_4096():
        if shape.name in {"gate_up", "down"}:
            assert LayerCost(shape, W4A16, 1).factor_share < 0.05
    for network in NETWORKS:
        costs = [LayerCost(it, W4A16, 1) for it in network.shapes() if it.name in JOINED]
        assert sum(it.factor_bytes for it in costs) < 0.05 * sum(it.weight_bytes for it in costs)


def test_joined_layers_have_the_factors_of_their_parts():
    for network in NETWORKS:
        shapes = {it.name: it for it in network.shapes()}
        for joined, parts in (("qkv", "q k v"), ("gate_up", "gate up")):
            apart = [LayerCost(shapes[part], W4A16, 1) for part in parts.split()]
            assert LayerCost(shapes[joined], W4A16, 1).factor_bytes == sum(it.factor_bytes for it in apart)
            assert LayerCost(shapes[joined], W4A16, 1).weight_bytes == sum(it.weight_bytes for it in apart)


def test_cards_are_found_by_their_whole_names():
    assert card_of("NVIDIA A10").name == "A10"
    assert card_of("NVIDIA A100-SXM4-80GB").name == "A100 80GB SXM"
    assert card_of("NVIDIA A100-PCIE-40GB") is None
    assert all(card.int8 >= 2 * card.bf16 and card.source for card in CARDS)
    with pytest.raises(KeyError):
        card_named("A1000")


def test_the_document_has_the_tables_as_they_are():
    document = tool.DOCUMENT.read_text(encoding="utf-8")
    assert tool.tables() in document
    assert tool.with_tables(document) == document
    for shape in network_shapes(JOINED):
        assert f"| {shape.network} | {shape.name} {shape.out_features} x {shape.in_features} | 4096 |" in document
