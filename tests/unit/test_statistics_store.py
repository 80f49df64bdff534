"""The statistics store: what comes back is what went in, bit for bit, or nothing at all."""

import os
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from models.calibration.store import StatisticsStore
from models.errors import CalibrationError
from models.types import InputStatistics, Statistic

Q, K, V, O_PROJ = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
INPUTS = frozenset(s for s in Statistic if not s.needs_gradients)


def symmetric(size, seed):
    rows = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    product = rows.T @ rows
    return (product + product.T) / 2


def statistics(size=5, seed=0, num_tokens=7, **changes):
    generator = torch.Generator().manual_seed(seed)
    vector = lambda: torch.rand(size, dtype=torch.float64, generator=generator)  # noqa: E731
    values = {
        "autocorrelation": symmetric(size, seed),
        "quantized_autocorrelation": symmetric(size, seed + 1),
        "cross_correlation": torch.randn(size, size, dtype=torch.float64, generator=generator),
        "mean_square": vector(),
        "mean_abs": vector(),
        "absmax": vector(),
    }
    return InputStatistics(num_tokens=num_tokens, **(values | changes))


def tensors_of(item):
    return {f.name: getattr(item, f.name) for f in fields(item) if f.name != "num_tokens"}


def assert_equal(ours, expected):
    assert ours.num_tokens == expected.num_tokens
    for name, tensor in tensors_of(expected).items():
        found = getattr(ours, name)
        assert (found is None) == (tensor is None), name
        assert tensor is None or (found.dtype == tensor.dtype and torch.equal(found, tensor)), name


def test_statistics_come_back_bit_for_bit_and_shared_as_they_were(tmp_path):
    attention, output = statistics(), statistics(size=3, seed=5)
    StatisticsStore(tmp_path / "s", "f").save(2, {Q: attention, K: attention, V: attention, O_PROJ: output})
    store = StatisticsStore(tmp_path / "s", "f")
    loaded = store.load(2, INPUTS)
    assert_equal(loaded[Q], attention)
    assert_equal(loaded[O_PROJ], output)
    assert loaded[Q] is loaded[K] is loaded[V]
    assert (store.num_loaded, store.num_saved) == (1, 0)
    assert store.has(2, INPUTS)
    assert not store.has(1, INPUTS)
    assert not store.has(2, frozenset({Statistic.FISHER}))
    assert store.num_loaded == 1


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), seed=st.integers(0, 10**6), is_symmetric=st.booleans())
def test_any_matrix_survives_packing(tmp_path_factory, size, seed, is_symmetric):
    matrix = symmetric(size, seed)
    if not is_symmetric:
        matrix[0, -1] = torch.nextafter(matrix[0, -1], torch.tensor(torch.inf, dtype=torch.float64))
    store = StatisticsStore(tmp_path_factory.mktemp("store"), "f")
    store.save(0, {Q: InputStatistics(3, autocorrelation=matrix)})
    assert torch.equal(store.load(0, frozenset({Statistic.AUTOCORRELATION}))[Q].autocorrelation, matrix)


def test_symmetric_matrices_take_half_the_space_and_shared_ones_are_stored_once(tmp_path):
    size = 64
    item = InputStatistics(1, autocorrelation=symmetric(size, 0))
    StatisticsStore(tmp_path, "f").save(0, {Q: item, K: item, V: item})
    with safe_open(tmp_path / "layer-00000.safetensors", framework="pt") as file:
        assert [file.get_tensor(name).numel() for name in file.keys()] == [size * (size + 1) // 2]  # noqa: SIM118


def test_only_what_is_required_is_returned_with_the_flattening(tmp_path):
    store = StatisticsStore(tmp_path, "f")
    store.save(0, {Q: statistics(flattening=torch.ones(5, dtype=torch.float64))})
    loaded = store.load(0, frozenset({Statistic.MEAN_ABS}))[Q]
    assert [name for name, value in tensors_of(loaded).items() if value is not None] == ["mean_abs", "flattening"]


def test_gradients_of_layers_that_share_an_input_stay_their_own(tmp_path):
    shared = torch.rand(4, dtype=torch.float64)
    items = {
        path: InputStatistics(
            2, mean_square=shared, fisher_rows=torch.full((n,), float(n)), fisher_columns=torch.ones(4)
        )
        for path, n in ((Q, 8), (K, 2))
    }
    store = StatisticsStore(tmp_path, "f")
    store.save(0, items)
    loaded = store.load(0, frozenset({Statistic.FISHER, Statistic.MEAN_SQUARE}))
    for path, item in items.items():
        assert_equal(loaded[path], item)
    assert loaded[Q].mean_square is loaded[K].mean_square


def test_absent_incomplete_and_foreign_statistics_are_none(tmp_path):
    store = StatisticsStore(tmp_path, "f")
    assert store.load(0, frozenset()) is None
    store.save(0, {Q: InputStatistics(1, mean_abs=torch.ones(2, dtype=torch.float64))})
    assert store.load(0, frozenset({Statistic.MEAN_SQUARE})) is None
    assert store.load(0, frozenset({Statistic.FISHER})) is None
    assert store.load(1, frozenset({Statistic.MEAN_ABS})) is None
    assert StatisticsStore(tmp_path, "other").load(0, frozenset({Statistic.MEAN_ABS})) is None
    assert store.load(0, frozenset({Statistic.MEAN_ABS})) is not None


def test_later_statistics_are_kept_beside_the_earlier_ones(tmp_path):
    first = InputStatistics(3, mean_abs=torch.rand(4, dtype=torch.float64))
    second = InputStatistics(3, mean_square=torch.rand(4, dtype=torch.float64))
    store = StatisticsStore(tmp_path, "f")
    store.save(0, {Q: first, K: first})
    store.save(0, {Q: second, K: second})
    loaded = store.load(0, frozenset({Statistic.MEAN_ABS, Statistic.MEAN_SQUARE}))
    assert torch.equal(loaded[K].mean_abs, first.mean_abs)
    assert torch.equal(loaded[K].mean_square, second.mean_square)
    assert loaded[Q] is loaded[K]
    store.save(0, {Q: InputStatistics(4, mean_square=second.mean_square)})
    assert store.load(0, frozenset({Statistic.MEAN_ABS})) is None


def test_a_bit_flipped_anywhere_never_comes_back_as_statistics_nor_crashes(tmp_path):
    item = InputStatistics(3, autocorrelation=symmetric(3, 0), mean_abs=torch.rand(3, dtype=torch.float64))
    requires = frozenset({Statistic.AUTOCORRELATION, Statistic.MEAN_ABS})
    store = StatisticsStore(tmp_path, "f")
    store.save(0, {Q: item})
    path = tmp_path / "layer-00000.safetensors"
    intact = path.read_bytes()
    for position in range(0, len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x11]) + intact[position + 1 :])
        loaded = store.load(0, requires)
        if loaded is not None:  # blanks and names in the header that change nothing
            assert_equal(loaded[Q], item)
    path.write_bytes(intact[:-5])
    assert store.load(0, requires) is None
    store.save(0, {Q: item})
    assert_equal(store.load(0, requires)[Q], item)


def test_an_interrupted_save_leaves_the_former_file(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path, "f")
    store.save(0, {Q: statistics()})
    intact = (tmp_path / "layer-00000.safetensors").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("models.calibration.store.save_file", fail)
    with pytest.raises(CalibrationError, match="No space left"):
        store.save(0, {Q: statistics(seed=9)})
    assert (tmp_path / "layer-00000.safetensors").read_bytes() == intact
    assert len(list(tmp_path.iterdir())) == 1
