"""Layout of weights for the Triton kernels: every code at the place that its definition gives, and back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels.triton.environment import TritonEnvironment, architecture
from models.kernels.triton.pack import PackedWeight, pack_quantized, pack_weights
from models.quant.grid import dequantize
from models.scheme import GROUP_SIZES, QuantScheme
from models.types import LinearWeights, QuantizedWeight

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@st.composite
def schemes(draw: st.DrawFn) -> QuantScheme:
    name = draw(st.sampled_from(("int", "int", "int", "mxint", "mxfp4", "nf4")))
    num_bits = 4 if name in {"mxfp4", "nf4"} else draw(st.integers(2, 8))
    return QuantScheme(num_bits, draw(st.sampled_from(GROUP_SIZES[name])), draw(st.booleans()), format=name)


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    """Codes, scales and zero points of all values that the format has, with odd sizes."""
    scheme, out_features, seed = draw(schemes()), draw(st.integers(1, 9)), draw(st.integers(0, 2**20))
    per_channel = scheme.group_size == -1
    in_features = draw(st.integers(1, 70)) if per_channel else scheme.group_size * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    grid = (out_features, scheme.num_groups(in_features))

    def some(shape: tuple[int, int]) -> Tensor:
        return torch.randint(1 << scheme.num_bits, shape, generator=generator, dtype=torch.uint8)

    scale = torch.rand(grid, generator=generator).add(0.01).half()
    if scheme.has_exponent_scale:
        scale = torch.randint(-126, 127, grid, generator=generator).double().exp2().bfloat16()
    return QuantizedWeight(
        some((out_features, in_features)), scale, None if scheme.is_symmetric else some(grid), scheme
    )


def field(words: Tensor, k: int, n: int, num_bits: int) -> int:
    """Code of input channel k as the layout's definition places it, in Python integers."""
    per_word = 32 // num_bits
    return (int(words[k // per_word, n]) & 0xFFFFFFFF) >> (num_bits * (k % per_word)) & ((1 << num_bits) - 1)


def code(packed: PackedWeight, k: int, n: int) -> int:
    high = 0 if packed.high_words is None else field(packed.high_words, k, n, 1)
    return field(packed.words, k, n, packed.storage_bits) | high << 2


@settings(max_examples=60, deadline=None)
@given(weights())
def test_codes_scales_and_zeros_lie_where_the_layout_says(quantized: QuantizedWeight) -> None:
    packed = pack_quantized(quantized, CPU)
    length = quantized.scheme.group_length(quantized.in_features)
    assert (packed.out_features, packed.in_features, packed.group_size) == (*quantized.codes.shape, length)
    for n, row in enumerate(quantized.codes.tolist()):
        assert [code(packed, k, n) for k in range(len(row))] == row
    assert torch.equal(packed.scale.T, quantized.scale)
    assert (packed.zero is None) == (quantized.zero_point is None)
    if packed.zero is not None and quantized.zero_point is not None:
        assert torch.equal(packed.zero.T.float(), quantized.zero_point.float())


@settings(max_examples=60, deadline=None)
@given(weights(), st.data())
def test_a_packed_weight_gives_back_all_codes_and_numbers(quantized: QuantizedWeight, data: st.DataObject) -> None:
    packed, expected = pack_quantized(quantized, CPU), dequantize(quantized)
    assert torch.equal(packed.codes(), quantized.codes)
    assert torch.equal(packed.dequantize(), expected)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, quantized.out_features - 1), max_size=4)), dtype=torch.int64)
    assert torch.equal(packed.dequantize(rows), expected[rows])


@pytest.mark.parametrize("num_bits", [3, 4])
@pytest.mark.parametrize("rows", [[], [0], [0, 0]])
def test_a_weight_of_one_channel_gives_its_row_as_often_as_asked(num_bits: int, rows: list[int]) -> None:
    # torch calls a dimension of length 1 contiguous whatever its stride is
    scheme = QuantScheme(num_bits, -1, True)
    quantized = QuantizedWeight(torch.tensor([[5]], dtype=torch.uint8), torch.ones(1, 1).half(), None, scheme)
    indices = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(pack_quantized(quantized, CPU).codes(indices), quantized.codes[indices])


@settings(max_examples=40, deadline=None)
@given(weights())
def test_padding_stands_for_zero_and_ends_with_a_whole_word_of_every_plane(quantized: QuantizedWeight) -> None:
    packed = pack_quantized(quantized, CPU)
    padded = packed.words.shape[0] * packed.per_word
    assert padded % 32 == 0
    assert 0 <= padded - packed.in_features < 32
    if packed.high_words is not None:
        assert packed.high_words.shape[0] * 32 == padded
    for n in range(packed.out_features):
        zero = packed.middle if packed.zero is None else float(packed.zero[-1, n])
        for k in range(packed.in_features, padded):
            found = code(packed, k, n)
            assert (found == zero) if packed.table is None else (float(packed.table[found]) == 0)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_a_code_takes_its_bits_where_words_can_hold_them(num_bits: int) -> None:
    quantized = QuantizedWeight(
        torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 4).half(), None, QuantScheme(num_bits, 64, True)
    )
    packed = pack_weights(LinearWeights(quantized), CPU)
    stored = {2: 2, 3: 3, 4: 4}.get(num_bits, 8)
    assert packed.nbytes == 64 * 256 * stored // 8 + 64 * 4 * 2
    assert packed.words.is_contiguous()
    assert packed.scale.is_contiguous()


@pytest.mark.parametrize(
    ("environment", "device", "reason"),
    [
        (TritonEnvironment("3.9.0", False), "cpu", "CUDA devices only, not on cpu"),
        (TritonEnvironment("3.9.0", False), "mps", "CUDA devices only, not on mps"),
        (TritonEnvironment(None, True), "cpu", "pip install 'qerve[gpu]'"),
        (TritonEnvironment(None, False), "cuda", "pip install 'qerve[gpu]'"),
    ],
)
def test_the_environment_says_why_kernels_do_not_run(environment: TritonEnvironment, device: str, reason: str) -> None:
    assert reason in (environment.why_not(torch.device(device)) or "")


def test_the_interpreter_runs_on_the_cpu() -> None:
    assert TritonEnvironment("3.9.0", True).why_not(CPU) is None


def test_a_device_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = TritonEnvironment("3.9.0", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in (environment.why_not(torch.device("cuda")) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a Turing card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "cuda:1 is not here" in (environment.why_not(torch.device("cuda:1")) or "")
    assert "needs compute capability 8.0 or newer, a Turing card has 7.5" in (
        environment.why_not(torch.device("cuda:0")) or ""
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert environment.why_not(torch.device("cuda:0")) is None
    assert architecture(torch.device("cuda:0")) == 89
    assert "TRITON_INTERPRET=1" in (TritonEnvironment("3.9.0", True).why_not(torch.device("cuda:0")) or "")


def test_without_triton_everything_but_its_kernels_can_be_imported() -> None:
    script = "import sys; sys.modules['triton'] = None; import models.kernels, models.artifact.inspect, service.cli"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_server_does_not_import_compilers_before_it_needs_them() -> None:
    """They would take seconds of its start, and a third of its memory."""
    script = "import sys, service.process, models.artifact.load; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert {"triton", "torch._dynamo", "torch._inductor", "sympy", "transformers", "ray"} & set(
        done.stdout.split()
    ) == set()


def test_the_environment_is_read_from_its_variables() -> None:
    assert TritonEnvironment.read({"TRITON_INTERPRET": "1"}).is_interpreting
    assert not TritonEnvironment.read({"TRITON_INTERPRET": "0"}).is_interpreting
    assert not TritonEnvironment.read({}).is_interpreting
