"""Low-rank factors on the device: which stay INT8, what they stand for, how many bytes they are."""

import pytest
import torch

from models.config import FactorDtype
from models.kernels.reference import ReferenceBackend
from models.kernels.triton.backend import TritonBackend
from models.kernels.triton.environment import TritonEnvironment
from models.kernels.triton.factors import UP_STEPS, pack_factors
from models.kernels.triton.pack import pack_weights
from models.quant.factors import FACTOR_SCHEMES, store_factors
from models.quant.grid import dense_factors
from models.scheme import ActivationScheme, QuantScheme
from models.types import Correction, LinearWeights, QuantizedWeight
from tests.support.linear_oracle import random_layer

CPU = torch.device("cpu")
REASON = TritonEnvironment.read().why_not(CPU)
INTERPRETED = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FLOAT16 = torch.float16
OTHER_DTYPES: tuple[FactorDtype, ...] = ("bfloat16", "float16", "float32", "int4", "mxint8", "mxint6", "mxint4")


def correction_of(factor_dtype: FactorDtype, *, is_single: bool = False) -> Correction:
    return store_factors(torch.randn(64, 32), None if is_single else torch.randn(32, 96), factor_dtype)


def random_codes(rows: int, columns: int, scheme: QuantScheme) -> QuantizedWeight:
    num_groups = columns // scheme.group_length(columns)
    scale = torch.full((rows, num_groups), 0.01).half()
    zero = None if scheme.is_symmetric else torch.full((rows, num_groups), 7, dtype=torch.uint8)
    codes = torch.randint(0, 1 << scheme.num_bits, (rows, columns), dtype=torch.uint8)
    return QuantizedWeight(codes, scale, zero, scheme)


def test_a_pair_in_int8_stays_int8_and_stands_for_the_same_product() -> None:
    correction = correction_of("int8")
    packed = pack_factors(correction, CPU, FLOAT16)
    assert packed is not None and packed.lora_down is not None and packed.component_scale is not None
    assert packed.lora_up.dtype == packed.lora_down.dtype == torch.int8
    assert packed.lora_up.shape == (32, 64) and packed.lora_down.shape == (32, 96)
    up, down = dense_factors(correction)
    assert down is not None
    found = (
        packed.lora_up.double() / UP_STEPS * packed.component_scale.double()[:, None]
    ).T @ packed.lora_down.double()
    # scales have 11 bits: their product, and 128 of it, are exact in float32
    assert torch.allclose(found, up.double() @ down.double(), rtol=1e-13, atol=1e-13)


def test_the_lowest_code_keeps_its_sign() -> None:
    codes = torch.tensor([[0, 1, 128, 255]], dtype=torch.uint8)
    factor = QuantizedWeight(codes, torch.ones(1, 1).half(), None, FACTOR_SCHEMES["int8"])
    packed = pack_factors(Correction(factor, factor), CPU, FLOAT16)
    assert packed is not None
    assert packed.lora_up.tolist() == [[-128, -127, 0, 127]]


@pytest.mark.parametrize("factor_dtype", OTHER_DTYPES)
def test_other_forms_are_widened(factor_dtype: FactorDtype) -> None:
    correction = correction_of(factor_dtype)
    packed = pack_factors(correction, CPU, FLOAT16)
    assert packed is not None and packed.lora_down is not None
    up, down = dense_factors(correction)
    assert down is not None and packed.component_scale is None
    assert torch.equal(packed.lora_up, up.T.half()) and torch.equal(packed.lora_down, down.half())
    assert packed.nbytes == 2 * 32 * (64 + 96)


def test_a_single_factor_is_widened_and_no_component_is_no_factor() -> None:
    packed = pack_factors(correction_of("int8", is_single=True), CPU, FLOAT16)
    assert packed is not None
    assert packed.lora_up.dtype == FLOAT16 and packed.lora_down is None
    assert pack_factors(None, CPU, FLOAT16) is None
    assert pack_factors(Correction(torch.zeros(64, 0), torch.zeros(0, 96)), CPU, FLOAT16) is None


def test_int8_factors_are_below_five_percent_of_a_4096_wide_layer_and_16_bit_ones_are_not() -> None:
    width, rank = 4096, 32
    scheme = FACTOR_SCHEMES["int8"]
    layer = LinearWeights(
        random_codes(width, width, QuantScheme(4, 64)),
        Correction(random_codes(rank, width, scheme), random_codes(rank, width, scheme)),
    )
    resident = pack_weights(layer, CPU).nbytes
    assert layer.correction is not None
    packed = pack_factors(layer.correction, CPU, FLOAT16)
    widened = pack_factors(Correction(*dense_factors(layer.correction)), CPU, FLOAT16)
    assert packed is not None and widened is not None
    assert packed.nbytes == 2 * rank * width + 4 * rank
    assert packed.nbytes < 0.05 * resident < widened.nbytes


@INTERPRETED
@pytest.mark.parametrize("activations", [None, ActivationScheme(8)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_layers_with_int8_factors_are_those_of_the_reference_backend(
    activations: ActivationScheme | None, num_rows: int
) -> None:
    weights = random_layer(
        QuantScheme(4, 32), (21, 96), 32, "scale order", True, factor_dtype="int8", activations=activations
    )
    layer = TritonBackend(is_interpreter_wanted=True).prepare(weights, CPU, FLOAT16)
    x = torch.randn(num_rows, 96).half()
    # both round weights or inputs, the low-rank term between its factors, and the output: 2**-11 of it each
    expected = ReferenceBackend().prepare(weights, CPU, FLOAT16)(x).double()
    assert (layer(x).double() - expected).norm() <= 3 * 2.0**-11 * expected.norm()
    widened = random_layer(QuantScheme(4, 32), (21, 96), 32, "scale order", True, activations=activations)
    saved = TritonBackend(is_interpreter_wanted=True).prepare(widened, CPU, FLOAT16).nbytes - layer.nbytes
    assert saved == 32 * (21 + 96) - 4 * 32


@INTERPRETED
@pytest.mark.parametrize("scheme", [ActivationScheme(4, 32, format="mxfp4"), ActivationScheme(8, 32)], ids=str)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_the_down_projection_comes_back_scaled(scheme: ActivationScheme, num_rows: int) -> None:
    from models.kernels.triton.inputs import FusedInput

    weights = random_layer(QuantScheme(4, -1), (8, 96), 8, factor_dtype="int8", activations=scheme)
    fused = FusedInput.of(weights, CPU, FLOAT16)
    prepared, reduced = fused.prepare_input(torch.randn(num_rows, 96).half())
    assert reduced is not None and fused.lora_down is not None and fused.component_scale is not None
    down = fused.lora_down.double() * fused.component_scale.double()[:, None]
    exact, size = prepared.double() @ down.T, prepared.double().abs() @ down.T.abs()
    assert reduced.dtype == FLOAT16
    # float32 sums and one product, rounded once to float16
    assert ((reduced.double() - exact).abs() <= 2.0**-11 * exact.abs() + 2.0**-24 * (98 * size + 1)).all()
