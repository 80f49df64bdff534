"""Input statistics against float64 double loops, and their collection from a decoder layer."""

import pytest
import torch
from torch import nn

from models.calibration.collect import INPUT_OWNERS, Measurement, Target, collect_statistics
from models.calibration.statistics import LayerInputs, StatisticsAccumulator
from models.errors import CalibrationError
from models.quant.activation import quantize_activations
from models.scheme import ActivationScheme
from models.transform.hadamard import hadamard_matrix
from models.transform.inputs import InputTransform
from models.types import Statistic

ALL = frozenset(statistic for statistic in Statistic if not statistic.needs_gradients)


def plain(x):
    return LayerInputs(x, x, x)


def batches_of(sizes, num_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, num_features, generator=generator) * 3 for size in sizes]


def test_statistics_equal_double_loops_over_tokens():
    batches = batches_of((5, 2, 7), 4)
    accumulator = StatisticsAccumulator(4, ALL)
    for batch in batches:
        accumulator.update(plain(batch))
    statistics = accumulator.finish("layer")
    rows = [row for batch in batches for row in batch.tolist()]
    assert statistics.num_tokens == len(rows) == 14
    for i in range(4):
        assert statistics.mean_square[i].item() == pytest.approx(sum(row[i] ** 2 for row in rows) / 14, rel=1e-6)
        batch_means = [sum(abs(row[i]) for row in batch.tolist()) / len(batch) for batch in batches]
        assert statistics.mean_abs[i].item() == pytest.approx(max(batch_means), rel=1e-6)
        assert statistics.absmax[i].item() == max(abs(row[i]) for row in rows)
        for j in range(4):
            expected = sum(row[i] * row[j] for row in rows) / 14
            assert statistics.autocorrelation[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_paired_statistics_equal_double_loops_over_tokens():
    x, quantized, target = (batches_of((6,), 3, seed)[0] for seed in range(3))
    accumulator = StatisticsAccumulator(3, ALL)
    accumulator.update(LayerInputs(x, quantized, target))
    statistics = accumulator.finish("layer")
    for i in range(3):
        for j in range(3):
            squares = sum(q[i] * q[j] for q in quantized.tolist()) / 6
            products = sum(q[i] * t[j] for q, t in zip(quantized.tolist(), target.tolist(), strict=True)) / 6
            assert statistics.quantized_autocorrelation[i, j].item() == pytest.approx(squares, rel=1e-5, abs=1e-5)
            assert statistics.cross_correlation[i, j].item() == pytest.approx(products, rel=1e-5, abs=1e-5)


def test_sums_keep_what_float32_would_lose():
    accumulator = StatisticsAccumulator(1, frozenset({Statistic.MEAN_SQUARE, Statistic.AUTOCORRELATION}))
    accumulator.update(plain(torch.tensor([[2.0**13]])))
    for _ in range(100):
        accumulator.update(plain(torch.tensor([[1.0]])))
    statistics = accumulator.finish("layer")
    expected = (2.0**26 + 100) / 101
    assert statistics.mean_square.item() == expected
    assert statistics.autocorrelation.item() == expected


def test_only_what_is_required_is_accumulated():
    accumulator = StatisticsAccumulator(3, frozenset({Statistic.MEAN_ABS}))
    accumulator.update(plain(torch.ones(2, 3)))
    statistics = accumulator.finish("layer")
    assert statistics.autocorrelation is None
    assert statistics.mean_square is None


def test_a_statistic_that_is_not_finite_names_the_layer():
    accumulator = StatisticsAccumulator(2, ALL)
    accumulator.update(plain(torch.tensor([[1.0, float("nan")]])))
    with pytest.raises(CalibrationError, match=r"layers\.3.*not finite"):
        accumulator.finish("model.layers.3.mlp.down_proj")


def test_a_layer_that_saw_no_tokens_is_an_error():
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        StatisticsAccumulator(2, ALL).finish("layer")


class TwoBranchLayer(nn.Module):
    """Children named as in a decoder layer, with a different input for each group."""

    def __init__(self, size=3):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, nn.Linear(size, size))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self.mlp, name, nn.Linear(size, size))

    def forward(self, x):
        q, k, v = (getattr(self.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        attended = self.self_attn.o_proj(q + k + v)
        return self.mlp.down_proj(self.mlp.gate_proj(attended) * self.mlp.up_proj(attended))


def collect(layer, batches, measurement, **options):
    return collect_statistics(layer, runs_of(batches), measurement, "model.layers.0", **options)


def runs_of(batches):
    return [lambda layer, batch=batch: layer(batch) for batch in batches]


@torch.no_grad()
def inputs_of(layer, batches):
    """What reaches q_proj, o_proj, gate_proj and down_proj."""
    x = torch.cat(batches)
    attended = sum(getattr(layer.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    hidden = layer.self_attn.o_proj(attended)
    return dict(zip(INPUT_OWNERS, (x, attended, hidden, layer.mlp.gate_proj(hidden) * layer.mlp.up_proj(hidden))))  # noqa: B905


def test_collection_watches_each_shared_input_once():
    torch.manual_seed(0)
    layer, batches = TwoBranchLayer(), batches_of((4, 6), 3)
    statistics = collect(layer, batches, Measurement(frozenset({Statistic.MEAN_SQUARE})))
    assert set(statistics) == {member for members in INPUT_OWNERS.values() for member in members}
    assert statistics["self_attn.q_proj"] is statistics["self_attn.v_proj"]
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
    for owner, x in inputs_of(layer, batches).items():
        expected = x.double().square().mean(0)
        torch.testing.assert_close(statistics[owner].mean_square, expected, rtol=1e-5, atol=1e-6)


def test_inputs_are_rotated_and_quantized_before_they_are_measured():
    torch.manual_seed(0)
    layer, batches = TwoBranchLayer(4), batches_of((4, 6), 4)
    activations = ActivationScheme(num_bits=4)
    transforms = {"mlp.down_proj": InputTransform(rotation_block=4)}
    statistics = collect(layer, batches, Measurement(ALL, transforms, activations))
    for owner, x in inputs_of(layer, batches).items():
        rotated = x @ hadamard_matrix(4) if owner == "mlp.down_proj" else x
        quantized = quantize_activations(rotated, activations).double()
        torch.testing.assert_close(statistics[owner].absmax, rotated.double().abs().amax(0), rtol=1e-5, atol=1e-6)
        expected = quantized.T @ rotated.double() / 10
        torch.testing.assert_close(statistics[owner].cross_correlation, expected, rtol=1e-4, atol=1e-4)
        expected = quantized.T @ quantized / 10
        torch.testing.assert_close(statistics[owner].quantized_autocorrelation, expected, rtol=1e-4, atol=1e-4)


def test_target_comes_from_the_dense_layer_on_its_own_inputs():
    torch.manual_seed(0)
    layer, dense = TwoBranchLayer(), TwoBranchLayer()
    batches, dense_batches = batches_of((4, 6), 3), batches_of((4, 6), 3, seed=1)
    measurement = Measurement(frozenset({Statistic.CROSS_CORRELATION}))
    statistics = collect(layer, batches, measurement, target=Target(dense, runs_of(dense_batches)))
    targets = inputs_of(dense, dense_batches)
    for owner, x in inputs_of(layer, batches).items():
        expected = x.double().T @ targets[owner].double() / 10
        torch.testing.assert_close(statistics[owner].cross_correlation, expected, rtol=1e-4, atol=1e-4)


def test_neither_targets_nor_quantized_inputs_are_worked_out_for_statistics_that_need_neither(monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("not needed")

    monkeypatch.setattr("models.calibration.collect.quantize_activations", refuse)
    measurement = Measurement(frozenset({Statistic.AUTOCORRELATION}), activations=ActivationScheme(num_bits=4))
    layer, batches = TwoBranchLayer(), batches_of((4, 6), 3)
    plain = collect(layer, batches, Measurement(measurement.requires))
    statistics = collect(layer, batches, measurement, target=Target(TwoBranchLayer(), [refuse, refuse]))
    for owner in INPUT_OWNERS:
        assert torch.equal(statistics[owner].autocorrelation, plain[owner].autocorrelation)


def test_watching_one_owner_leaves_the_rest_of_the_layer_out():
    layer = TwoBranchLayer()
    calls = []
    layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: calls.append("gate"))
    statistics = collect(layer, batches_of((4,), 3), Measurement(ALL), owners=("self_attn.o_proj",))
    assert set(statistics) == {"self_attn.o_proj"}
    assert calls == []


def test_collection_leaves_no_hooks_behind():
    layer = TwoBranchLayer()

    def interrupted(layer):
        layer.self_attn.q_proj(torch.ones(2, 3))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        collect_statistics(layer, [interrupted], Measurement(ALL), "layer")
    assert not any(module._forward_pre_hooks for module in layer.modules())
