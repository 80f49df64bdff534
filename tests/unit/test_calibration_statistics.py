"""Input statistics against float64 double loops, and their collection from a decoder layer."""

import pytest
import torch
from torch import nn

from models.calibration.collect import INPUT_OWNERS, collect_statistics
from models.calibration.statistics import StatisticsAccumulator
from models.errors import CalibrationError
from models.types import Statistic

ALL = frozenset(Statistic)


def batches_of(sizes, num_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, num_features, generator=generator) * 3 for size in sizes]


def test_statistics_equal_double_loops_over_tokens():
    batches = batches_of((5, 2, 7), 4)
    accumulator = StatisticsAccumulator(4, ALL)
    for batch in batches:
        accumulator.update(batch)
    statistics = accumulator.finish("layer")
    rows = [row for batch in batches for row in batch.tolist()]
    assert statistics.num_tokens == len(rows) == 14
    for i in range(4):
        assert statistics.mean_square[i].item() == pytest.approx(sum(row[i] ** 2 for row in rows) / 14, rel=1e-6)
        batch_means = [sum(abs(row[i]) for row in batch.tolist()) / len(batch) for batch in batches]
        assert statistics.mean_abs[i].item() == pytest.approx(max(batch_means), rel=1e-6)
        for j in range(4):
            expected = sum(row[i] * row[j] for row in rows) / 14
            assert statistics.autocorrelation[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_sums_keep_what_float32_would_lose():
    accumulator = StatisticsAccumulator(1, frozenset({Statistic.MEAN_SQUARE, Statistic.AUTOCORRELATION}))
    accumulator.update(torch.tensor([[2.0**13]]))
    for _ in range(100):
        accumulator.update(torch.tensor([[1.0]]))
    statistics = accumulator.finish("layer")
    expected = (2.0**26 + 100) / 101
    assert statistics.mean_square.item() == expected
    assert statistics.autocorrelation.item() == expected


def test_only_what_is_required_is_accumulated():
    accumulator = StatisticsAccumulator(3, frozenset({Statistic.MEAN_ABS}))
    accumulator.update(torch.ones(2, 3))
    statistics = accumulator.finish("layer")
    assert statistics.autocorrelation is None
    assert statistics.mean_square is None


def test_a_statistic_that_is_not_finite_names_the_layer():
    accumulator = StatisticsAccumulator(2, ALL)
    accumulator.update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CalibrationError, match=r"layers\.3.*not finite"):
        accumulator.finish("model.layers.3.mlp.down_proj")


def test_a_layer_that_saw_no_tokens_is_an_error():
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        StatisticsAccumulator(2, ALL).finish("layer")


class TwoBranchLayer(nn.Module):
    """Children named as in a decoder layer, with a different input for each group."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, nn.Linear(3, 3))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self.mlp, name, nn.Linear(3, 3))

    def forward(self, x):
        q, k, v = (getattr(self.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        attended = self.self_attn.o_proj(q + k + v)
        return self.mlp.down_proj(self.mlp.gate_proj(attended) * self.mlp.up_proj(attended))


def test_collection_watches_each_shared_input_once():
    torch.manual_seed(0)
    layer, batches = TwoBranchLayer(), batches_of((4, 6), 3)

    def run():
        for batch in batches:
            layer(batch)

    statistics = collect_statistics(layer, run, frozenset({Statistic.MEAN_SQUARE}), "model.layers.0")
    assert set(statistics) == {member for members in INPUT_OWNERS.values() for member in members}
    assert statistics["self_attn.q_proj"] is statistics["self_attn.v_proj"]
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
    expected = torch.cat(batches).double().square().mean(0)
    torch.testing.assert_close(statistics["self_attn.k_proj"].mean_square, expected)
    with torch.no_grad():
        x = torch.cat(batches)
        attended = layer.self_attn.o_proj(sum(getattr(layer.self_attn, n)(x) for n in ("q_proj", "k_proj", "v_proj")))
    torch.testing.assert_close(
        statistics["mlp.gate_proj"].mean_square, attended.double().square().mean(0), rtol=1e-5, atol=1e-6
    )


def test_collection_leaves_no_hooks_behind():
    layer = TwoBranchLayer()

    def run():
        layer(torch.ones(2, 3))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        collect_statistics(layer, run, ALL, "layer")
    assert not any(module._forward_pre_hooks for module in layer.modules())
