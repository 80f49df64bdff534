"""Networks of random weights: as large as foretold, alike each time, and they run."""

from dataclasses import replace

import pytest
import torch

from models.bench.random_model import SHAPES, random_weights, weight_bytes
from models.bench.strips import has_low_rank, matrices_of
from models.llama.batch import Batch
from models.llama.native import NativeLlama
from tests.support.native import needs_native, runtime

pytestmark = needs_native
CONFIG = replace(
    SHAPES["tinyllama-1.1b"],
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
)


@pytest.mark.parametrize("rank", [0, 32])
def test_it_takes_the_memory_that_was_foretold(rank):
    weights = random_weights(CONFIG, rank, 8, runtime())
    network = NativeLlama(weights, runtime())
    assert sum(weights.resident_bytes.values()) == pytest.approx(weight_bytes(CONFIG, rank), rel=0.1)
    assert has_low_rank(weights) == (rank > 0)
    assert len(matrices_of(weights)) == 7 * 3 + 1
    assert network.logits(network(Batch.uncached([[1, 2, 3, 2047]]))).isfinite().all()


def test_it_is_the_same_each_time():
    first, second = (matrices_of(random_weights(CONFIG, 32, 8, runtime())) for _ in range(2))
    assert all(torch.equal(a.strips, b.strips) for a, b in zip(first, second, strict=True))


def test_layers_differ():
    weights = random_weights(CONFIG, 0, 8, runtime())
    first, second = (layer.o_proj.matrices[0].strips for layer in weights.layers[:2])
    assert not torch.equal(first, second)
