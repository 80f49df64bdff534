"""What operators are said to do, counted from the shapes; and that each of them runs."""

from dataclasses import replace

import pytest
import torch

from models.bench.operators import INPUTS, OPERATORS, OperatorBench, Phase, Work, step_work
from models.bench.probe import SECONDS
from models.scheme import QuantScheme
from tests.support.artifact_builder import LinearKind
from tests.support.native import needs_native
from tests.support.native_network import network_of, save

pytestmark = needs_native
PHASES = [Phase("decode 3", 3, 1, 20, 2), Phase("prefill 40", 1, 40, 40, 1)]
RANK, PADDED_RANK = 4, 32


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    return save(directory, network_of(LinearKind(QuantScheme(group_size=32), rank=RANK))).native()


def bench_of(network, phase):
    return OperatorBench(network, phase, torch.ones(1 << 16, dtype=torch.uint8))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_every_operator_takes_time(network, phase):
    bench = bench_of(network, phase)
    probes = list(bench.probes())
    assert [probe.metrics for probe in probes] == [(f"{phase.name}, {name}",) for name in (*OPERATORS, INPUTS)]
    for probe in probes:
        assert probe.unit == SECONDS
        (seconds,) = probe.run()
        assert seconds > 0


def test_multiply_adds_are_those_of_the_shapes(network):
    phase = PHASES[0]
    bench, config = bench_of(network, phase), network.config
    names = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
    for operator, members in names.items():
        expected = 0
        for path, shape in config.linear_shapes().items():
            if path.rsplit(".", 1)[1].removesuffix("_proj") in members:
                expected += shape.in_features * shape.out_features
                expected += PADDED_RANK * (shape.in_features + shape.out_features)
        assert bench.work(operator).multiply_adds == phase.num_rows * expected, operator
    assert bench.work("head").multiply_adds == phase.num_sequences * config.vocab_size * config.hidden_size
    assert bench.work(INPUTS) is None


def test_bytes_are_those_that_the_network_keeps(network):
    bench = bench_of(network, PHASES[1])
    num_bytes = sum(bench.work(operator).num_bytes for operator in ("qkv", "o", "gate_up", "down"))
    assert num_bytes == network.weights.resident_bytes["linear layers"]
    assert bench.work("head").num_bytes == network.weights.resident_bytes["head"]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_attention_counts_every_pair_that_it_sees(network, phase, window):
    config = replace(network.config, sliding_window=window)
    network = type(network)(replace(network.weights, config=config), network.runtime, network.cache_dtype)
    num_pairs = 0
    for query in range(phase.context_len - phase.num_new, phase.context_len):
        num_pairs += sum(1 for key in range(query + 1) if window is None or query - key < window)
    heads = config.num_hidden_layers * config.num_attention_heads * phase.num_sequences
    work = bench_of(network, phase).work("attention")
    assert work.multiply_adds == heads * num_pairs * config.head_dim * 2
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert work.num_bytes == kept * phase.context_len * phase.num_sequences


def test_a_step_does_what_its_operators_do(network):
    phase = PHASES[0]
    bench = bench_of(network, phase)
    parts = [bench.work(operator) for operator in OPERATORS if operator != "attention"]
    whole = step_work(network.weights, phase.num_rows, phase.num_sequences)
    assert whole == Work(sum(part.num_bytes for part in parts), sum(part.multiply_adds for part in parts))


def test_the_scarcer_peak_sets_the_least_time():
    work = Work(num_bytes=100, multiply_adds=1000)
    assert work.least_seconds(10, 10_000) == 10
    assert work.least_seconds(1000, 100) == 10
