"""Leaving out a low-rank term gives the bytes that packing without it gives; a first strip gives the first rows."""

from dataclasses import replace

import pytest
import torch

from models.bench.strips import first_strip, has_low_rank, matrices_of, weights_without_low_rank, without_low_rank
from models.kernels.native.inputs import LinearInput
from models.kernels.native.pack import pack_linear
from models.kernels.native.program import LinearCall
from models.scheme import QuantScheme
from tests.support.artifact_builder import LinearKind, random_linear
from tests.support.native import needs_native, runtime
from tests.support.native_network import network_of, save

pytestmark = needs_native
KINDS = [
    LinearKind(QuantScheme(group_size=64, is_symmetric=True), rank=32),
    LinearKind(QuantScheme(num_bits=8, group_size=32), rank=40, has_bias=True),
    LinearKind(QuantScheme(num_bits=2, group_size=64), rank=5, form="single-factor"),
    LinearKind(QuantScheme(group_size=64), form="none"),
]


def weights_of(kind, rows=80):
    return random_linear(rows, 192, kind, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [80, 24])
def test_rank_0_is_what_packing_without_the_term_gives(kind, rows):
    block = 64 if kind.scheme.group_size == 64 else 32
    weights = weights_of(kind, rows)
    bare = without_low_rank(pack_linear(runtime(), weights, block))
    plain = pack_linear(runtime(), replace(weights, correction=None), block)
    assert torch.equal(bare.strips, plain.strips)
    pointers = {"strips", "down", "bias"}
    for name, _ in bare.struct._fields_:
        assert name in pointers or getattr(bare.struct, name) == getattr(plain.struct, name), name
    assert bare.nbytes == plain.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_strip_gives_the_first_rows(kind):
    block = 64 if kind.scheme.group_size == 64 else 32
    weights = weights_of(kind)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    inputs = LinearInput.of(weights, 8)
    plain = pack_linear(runtime(), replace(weights, correction=None), block)
    strip = first_strip(pack_linear(runtime(), weights, block))
    assert torch.equal(LinearCall(runtime(), strip, inputs)(x), LinearCall(runtime(), plain, inputs)(x)[:, :32])


def test_a_whole_network_loses_its_terms_and_nothing_else(tmp_path):
    with_terms = save(tmp_path / "a", network_of(LinearKind(QuantScheme(group_size=32), rank=4))).native()
    model = network_of(LinearKind(QuantScheme(group_size=32), rank=4))
    for path, weights in model.linears.items():
        model.linears[path] = replace(weights, correction=None)
    without = save(tmp_path / "b", model).native()
    bare = weights_without_low_rank(with_terms.weights)
    assert has_low_rank(with_terms.weights)
    assert not has_low_rank(bare)
    pairs = list(zip(matrices_of(bare), matrices_of(without.weights), strict=True))
    assert len(pairs) == 7 * with_terms.config.num_hidden_layers + 1
    assert all(torch.equal(ours.strips, theirs.strips) for ours, theirs in pairs)
