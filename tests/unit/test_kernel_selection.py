"""Which backend runs a layer, why others do not, what stays in memory; and the layers that hold the result."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor

from models.errors import KernelError
from models.kernels import default_backends, get_backends, torch_int4, torch_int8
from models.kernels.base import LinearSpec
from models.kernels.native.backend import NativeBackend
from models.kernels.reference import ReferenceBackend
from models.kernels.torch_int4 import TorchInt4Backend
from models.kernels.torch_int8 import TorchInt8Backend
from models.layers.linear import DenseLinear, LowRankLinear
from models.scheme import ActivationScheme, QuantScheme
from tests.support.linear_oracle import expected_output, random_layer
from tests.support.native import needs_native

CPU = torch.device("cpu")
INT4 = LinearSpec(QuantScheme(4, 64), 128, 64, 8, False, False, CPU, torch.bfloat16)
INT8 = LinearSpec(QuantScheme(8, -1, True), 128, 64, 8, False, False, CPU, torch.bfloat16)


def resident_bytes(value: object) -> int:
    """Bytes of every tensor that can be reached from a prepared layer; views count as much as what they view."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if is_dataclass(value):
        return sum(resident_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(INT4, device=torch.device("cuda")), "CPU only, not on cuda"),
        (replace(INT4, dtype=torch.float32), "bfloat16 only, not in float32"),
        (replace(INT4, scheme=QuantScheme(3, 64)), "4-bit codes, not 3-bit"),
        (replace(INT4, scheme=QuantScheme(4, -1), in_features=80), "multiple of 32 input channels, not by 80"),
        (replace(INT4, scheme=QuantScheme(4, 16)), "multiple of 32 input channels, not by 16"),
        (replace(INT4, scheme=QuantScheme(4, 16, format="mxint")), "multiple of 32 input channels, not by 16"),
        (replace(INT4, scheme=QuantScheme(4, 32, format="mxfp4")), "uniform steps (int, mxint), not mxfp4"),
        (replace(INT4, scheme=QuantScheme(4, 64, format="nf4")), "uniform steps (int, mxint), not nf4"),
        (replace(INT4, scheme=QuantScheme(5, 32, format="mxint")), "4-bit codes, not 5-bit"),
        (replace(INT4, out_features=40), "multiple of 16, not 40"),
    ],
)
def test_torch_int4_says_why_it_cannot_run_a_layer(spec: LinearSpec, reason: str) -> None:
    assert TorchInt4Backend().unsupported(INT4) is None
    assert reason in (TorchInt4Backend().unsupported(spec) or "")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(INT8, device=torch.device("cuda")), "CPU only, not on cuda"),
        (replace(INT8, dtype=torch.float16), "bfloat16 only, not in float16"),
        (replace(INT8, scheme=QuantScheme(4, -1, True)), "8-bit codes, not 4-bit"),
        (replace(INT8, scheme=QuantScheme(8, 64, True)), "symmetric codes with one scale per row"),
        (replace(INT8, scheme=QuantScheme(8, -1, False)), "symmetric codes with one scale per row"),
        (replace(INT8, scheme=QuantScheme(8, 32, format="mxint")), "symmetric codes with one scale per row"),
        (replace(INT8, in_features=72), "multiple of 16, not 72"),
    ],
)
def test_torch_int8_says_why_it_cannot_run_a_layer(spec: LinearSpec, reason: str) -> None:
    assert TorchInt8Backend().unsupported(INT8) is None
    assert reason in (TorchInt8Backend().unsupported(spec) or "")


NATIVE = LinearSpec(QuantScheme(4, 64), 128, 64, 8, False, False, CPU, torch.bfloat16)


@needs_native
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(NATIVE, device=torch.device("cuda")), "CPU only, not on cuda"),
        (replace(NATIVE, dtype=torch.float64), "float32, bfloat16 and float16, not in float64"),
        (replace(NATIVE, scheme=QuantScheme(4, 32, format="mxfp4")), "uniform steps (int, mxint), not mxfp4"),
        (replace(NATIVE, scheme=QuantScheme(4, 64, format="nf4")), "uniform steps (int, mxint), not nf4"),
        (replace(NATIVE, scheme=QuantScheme(4, -1), in_features=80), "in_features must be a multiple of 32, not 80"),
        (replace(NATIVE, scheme=QuantScheme(4, 16)), "multiple of 32 input channels, not by 16"),
        (replace(NATIVE, scheme=QuantScheme(4, 16, format="mxint")), "multiple of 32 input channels, not by 16"),
        (replace(NATIVE, rotation_block=12), "blocks of a power of two, not of 12"),
        (
            replace(NATIVE, activations=ActivationScheme(4, 32, format="mxfp4")),
            "uniform steps (int, mxint), not as mxfp4",
        ),
        (replace(NATIVE, activations=ActivationScheme(8, 16, format="mxint")), "multiples of 32 channels, not 16"),
    ],
)
def test_the_native_backend_says_why_it_cannot_run_a_layer(spec: LinearSpec, reason: str) -> None:
    assert NativeBackend().unsupported(NATIVE) is None
    assert reason in (NativeBackend().unsupported(spec) or "")
    weights = random_layer(QuantScheme(4, 16), (32, 64))
    with pytest.raises(KernelError, match="multiple of 32 input channels, not by 16"):
        NativeBackend().prepare(weights, CPU, torch.float32)


def test_without_its_library_the_native_backend_says_so() -> None:
    assert NativeBackend(runtime="the library is not here").unsupported(NATIVE) == "the library is not here"


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(3, -1, True), QuantScheme(8, -1, True)], ids=str)
def test_where_it_can_the_native_backend_comes_first(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weights = random_layer(scheme, (32, 128), rank=4)
    linear = LowRankLinear.of(weights, get_backends("auto"), device=CPU, dtype=dtype, where="here")
    assert linear.selection.backend.name == "native"
    assert linear.selection.passed_over == ()


def test_a_torch_without_the_products_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "aten", object())
    assert "has no int4 product" in (TorchInt4Backend().unsupported(INT4) or "")
    assert "has no int8 product" in (TorchInt8Backend().unsupported(INT8) or "")


def make_linear(scheme: QuantScheme, dtype: torch.dtype, preference: str = "auto") -> LowRankLinear:
    weights = random_layer(scheme, (32, 128), rank=4)
    backends = get_backends(preference)
    if preference == "auto":
        backends = (NativeBackend(runtime="the native kernels are not built"), *backends[1:])
    return LowRankLinear.of(weights, backends, device=CPU, dtype=dtype, where="layers.0.q_proj")


@pytest.mark.parametrize(
    ("scheme", "dtype", "name", "passed_over"),
    [
        (QuantScheme(4, 64), torch.bfloat16, "torch-int4", ["native", "triton"]),
        (QuantScheme(8, -1, True), torch.bfloat16, "torch-int8", ["native", "triton", "torch-int4"]),
        (QuantScheme(3, 64), torch.bfloat16, "reference", ["native", "triton", "torch-int4", "torch-int8"]),
        (QuantScheme(4, 64), torch.float32, "reference", ["native", "triton", "torch-int4", "torch-int8"]),
        (QuantScheme(4, 32, format="mxint"), torch.bfloat16, "torch-int4", ["native", "triton"]),
        (
            QuantScheme(4, 32, format="mxfp4"),
            torch.bfloat16,
            "reference",
            ["native", "triton", "torch-int4", "torch-int8"],
        ),
        (
            QuantScheme(4, 64, format="nf4"),
            torch.bfloat16,
            "reference",
            ["native", "triton", "torch-int4", "torch-int8"],
        ),
    ],
)
def test_the_first_backend_that_can_is_chosen_and_the_reasons_are_kept(
    scheme: QuantScheme, dtype: torch.dtype, name: str, passed_over: list[str]
) -> None:
    linear = make_linear(scheme, dtype)
    assert linear.selection.backend.name == name
    assert [backend for backend, _reason in linear.selection.passed_over] == passed_over
    assert all(reason for _backend, reason in linear.selection.passed_over)
    assert f"backend={name}" in repr(linear)


def test_a_layer_tells_the_backends_how_its_input_is_treated() -> None:
    activations = ActivationScheme(4, 64)
    weights = random_layer(QuantScheme(4, 64), (32, 128), rotation_block=64, activations=activations)
    spec = LinearSpec.of(weights, CPU, torch.bfloat16)
    assert (spec.rotation_block, spec.activations) == (64, activations)
    assert TorchInt4Backend().unsupported(spec) is None


def test_a_backend_can_be_forced_and_then_nothing_stands_in_for_it() -> None:
    names = [backend.name for backend in default_backends()]
    assert names == ["native", "triton", "torch-int4", "torch-int8", "reference"]
    assert make_linear(QuantScheme(4, 64), torch.bfloat16, "reference").selection.backend.name == "reference"
    with pytest.raises(KernelError, match=r"layers\.0\.q_proj: .*torch-int4: takes 4-bit codes, not 5-bit"):
        make_linear(QuantScheme(5, 64), torch.bfloat16, "torch-int4")


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        KernelError, match="'gpu' is unknown; choose one of auto, native, triton, torch-int4, torch-int8, reference"
    ):
        get_backends("gpu")


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_the_reference_keeps_packed_codes_only(num_bits: int) -> None:
    weights = random_layer(QuantScheme(num_bits, 64), (64, 256), rank=4, has_bias=True)
    prepared = ReferenceBackend().prepare(weights, CPU, torch.float32)
    prepared(torch.randn(2, 256))
    grid, factors_and_bias = 64 * 4 * (2 + 1), (64 * 4 + 4 * 256 + 64) * 4
    assert prepared.nbytes == resident_bytes(prepared) == 64 * 256 * num_bits // 8 + grid + factors_and_bias


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(4, -1), QuantScheme(8, -1, True)], ids=str)
def test_torch_backends_keep_codes_once_and_count_every_byte(scheme: QuantScheme) -> None:
    weights = random_layer(scheme, (128, 512), rank=4, variant="scale order", has_bias=True)
    (backend,) = (b for b in default_backends()[2:-1] if b.unsupported(replace(INT4, scheme=scheme)) is None)
    prepared = backend.prepare(weights, CPU, torch.bfloat16)
    prepared(torch.randn(100, 512).bfloat16())
    assert prepared.nbytes == resident_bytes(prepared)
    assert prepared.nbytes < 1.2 * ReferenceBackend().prepare(weights, CPU, torch.bfloat16).nbytes


@pytest.mark.parametrize("num_tokens", [3, 90])
@pytest.mark.parametrize("change", ["blocks", "unknown layout", "layouts probed in another order"])
def test_int4_in_blocks_or_in_another_layout_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, change: str, num_tokens: int
) -> None:
    weights = random_layer(QuantScheme(4, 32), (192, 64), rank=4)
    x = torch.randn(num_tokens, 64).bfloat16()
    expected = TorchInt4Backend().prepare(weights, CPU, torch.bfloat16)(x).float()
    if change == "blocks":
        monkeypatch.setattr(torch_int4, "_WEIGHTS_AT_ONCE", 1)
    else:
        layouts = () if change == "unknown layout" else torch_int4._LAYOUTS[::-1]
        monkeypatch.setattr(torch_int4, "_LAYOUTS", layouts)
    changed = TorchInt4Backend().prepare(weights, CPU, torch.bfloat16)(x).float()
    assert float((changed - expected).norm()) <= torch.finfo(torch.bfloat16).eps * float(expected.norm())


def test_int8_in_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_layer(QuantScheme(8, -1, True), (50, 64), rank=4)
    x = torch.randn(40, 64).bfloat16()
    prepared = TorchInt8Backend().prepare(weights, CPU, torch.bfloat16)
    expected = prepared(x)
    monkeypatch.setattr(torch_int8, "_WEIGHTS_AT_ONCE", 64 * 16)
    assert torch.allclose(prepared(x), expected, rtol=2.0**-7, atol=1e-3)


def test_a_low_rank_linear_runs_its_backend_and_reports_its_bytes() -> None:
    weights = random_layer(QuantScheme(4, 64), (16, 64), rank=4, has_bias=True)
    linear = LowRankLinear.of(weights, get_backends("reference"), device=CPU, dtype=torch.float32, where="here")
    x = torch.randn(3, 64)
    assert torch.allclose(linear(x).double(), expected_output(weights, x).value, atol=1e-5)
    assert linear.nbytes == linear.prepared.nbytes > 0
    assert not list(linear.parameters())


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_dense_linear_is_the_definition_without_a_copy_of_its_weight(has_bias: bool) -> None:
    weight, bias = torch.randn(5, 7), torch.randn(5) if has_bias else None
    linear = DenseLinear(weight, bias)
    x = torch.randn(3, 7)
    expected = [
        [sum(a * b for a, b in zip(row, w, strict=True)) + (float(bias[o]) if has_bias else 0.0)
         for o, w in enumerate(weight.tolist())]
        for row in x.tolist()
    ]  # fmt: skip
    assert torch.allclose(linear(x), torch.tensor(expected), atol=1e-5)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert (linear.out_features, linear.in_features) == (5, 7)
    assert linear.nbytes == 4 * (35 + (5 if has_bias else 0))
    assert not linear.weight.requires_grad
