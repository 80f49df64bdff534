"""A linear layer in training computes what its merged form computes when it is served, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.artifact.linear import decode_linear, encode_linear
from models.artifact.record import LinearRecord
from models.artifact.shard import Shard, write_shard
from models.kernels.reference import ReferenceBackend
from models.quant.grid import dequantize, quantize
from models.quant.rtn import quantize_rtn
from models.reconstruct.qer import INTEGER_MERGES
from models.scheme import ActivationScheme, QuantScheme
from models.train.codes import TrainableCodes
from models.train.initial import BuiltLinear, trainable_linear
from models.train.linear import ActivationClip, TrainableLinear
from models.train.weight import MergedWeight, RequantizedWeight
from models.types import LinearWeights, QuantizedWeight
from tests.support.linear_oracle import expected_output
from tests.support.qer_cases import SCHEMES, input_statistics, qer, whole
from tests.support.training_cases import formed

MERGES = ["fixed-point", "shift", "direct", "ternary", "inside-rounding", "none", "requantize"]
MERGED = [merge for merge in MERGES if merge != "requantize"]
ACTIVATIONS = [None, ActivationScheme(4, -1), ActivationScheme(4, 32, True, clip_ratio=0.8), ActivationScheme(8, 32)]
OUT, IN = 24, 64


def built_linear(scheme: QuantScheme, activations: ActivationScheme | None = None, variant: str = "") -> BuiltLinear:
    """A layer by round to nearest on a narrowed grid, with what ``variant`` names: scale, order, rotation, bias."""
    weight = torch.randn(OUT, IN) * 0.05 + 0.01

    def narrowed(matrix: Tensor) -> QuantizedWeight:
        spanning = quantize_rtn(matrix, scheme)
        return quantize(matrix, (spanning.scale * 0.8).half(), spanning.zero_point, scheme)

    weights = LinearWeights(
        narrowed(weight),
        input_scale=torch.rand(IN) + 0.5 if "scale" in variant else None,
        channel_order=torch.randperm(IN).int() if "order" in variant else None,
        rotation_block=16 if "rotation" in variant else 0,
        activations=activations,
        bias=torch.randn(OUT) if "bias" in variant else None,
    )
    return BuiltLinear(weight, weights, input_statistics(IN), narrowed)


def trainable(built: BuiltLinear, merge: str, *, precision: torch.dtype = torch.float32) -> TrainableLinear:
    activations = built.weights.activations
    clip = None if activations is None else ActivationClip(activations, is_trained=True)
    return trainable_linear(qer(merge), built, clip, generator=torch.Generator().manual_seed(3), precision=precision)


def trained(built: BuiltLinear, merge: str) -> TrainableLinear:
    """The layer with every parameter far from its start, factors beyond their range too."""
    linear = trainable(built, merge)
    num_bits = built.weights.quantized.scheme.num_bits
    reach = qer(merge).options.largest_factor(num_bits) if merge in INTEGER_MERGES else 1.5
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if name.endswith("ratio"):
                parameter.mul_(0.9)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.05 if name.endswith("log_scale") else reach))
    return linear


def served(weights: LinearWeights, x: Tensor) -> Tensor:
    return ReferenceBackend().prepare(weights, torch.device("cpu"), torch.float32)(x)


def assert_equal(found: LinearWeights, wanted: LinearWeights) -> None:
    assert torch.equal(found.quantized.codes, wanted.quantized.codes)
    assert torch.equal(found.quantized.scale, wanted.quantized.scale)
    assert found.quantized.scale.dtype == torch.float16
    if wanted.quantized.zero_point is not None:
        assert found.quantized.zero_point is not None
        assert torch.equal(found.quantized.zero_point, wanted.quantized.zero_point)
    assert found.quantized.scheme == wanted.quantized.scheme
    assert (found.rotation_block, found.correction) == (wanted.rotation_block, wanted.correction)


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("merge", MERGED)
def test_a_trained_layer_and_its_merged_form_put_out_the_same_bits(
    merge: str, scheme: QuantScheme, activations: ActivationScheme | None
) -> None:
    built = built_linear(scheme, activations, "bias")
    linear, x = trained(built, merge), torch.randn(5, IN)
    merged = linear.merged()
    assert torch.equal(linear(x), served(merged, x))
    assert merged.correction is None
    assert merged.effective_bits == scheme.weight_bits(IN)
    assert merged.quantized.scale.dtype == torch.float16
    assert torch.equal(formed(linear.weight), dequantize(merged.quantized))
    if merge != "none":
        assert not torch.equal(merged.quantized.codes, built.weights.quantized.codes)
    assert not torch.equal(merged.quantized.scale, built.weights.quantized.scale)


@pytest.mark.parametrize("variant", ["rotation", "rotation bias", "scale order", "scale order rotation bias"])
@pytest.mark.parametrize("merge", MERGES)
def test_inputs_are_divided_gathered_and_rotated_as_when_served(merge: str, variant: str) -> None:
    linear, x = trained(built_linear(SCHEMES[1], ACTIVATIONS[1], variant), merge), torch.randn(5, IN)
    merged = linear.merged()
    if merge != "requantize":
        assert torch.equal(linear(x), served(merged, x))
    assert merged.rotation_block == (16 if "rotation" in variant else 0)
    assert (merged.input_scale is not None, merged.bias is not None) == ("scale" in variant, "bias" in variant)
    assert (merged.channel_order is not None) == ("order" in variant)


def test_the_merged_layer_is_the_definition_of_a_quantized_layer() -> None:
    linear = trained(built_linear(SCHEMES[1], None, "scale order bias"), "fixed-point")
    x = torch.randn(2, IN)
    expected = expected_output(linear.merged(), x)
    assert bool(((linear(x).double() - expected.value).abs() <= 1e-5 * expected.magnitude).all())


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("merge", MERGES)
def test_without_training_the_layer_is_the_base(
    merge: str, scheme: QuantScheme, activations: ActivationScheme | None
) -> None:
    built = built_linear(scheme, activations, "bias rotation")
    linear, x = trainable(built, merge), torch.randn(5, IN)
    assert_equal(linear.merged(), built.weights)
    assert torch.equal(linear(x), served(built.weights, x))


def test_scales_that_are_not_trained_stay_to_the_bit_and_clips_too() -> None:
    built = built_linear(SCHEMES[0], ActivationScheme(4, 32, clip_ratio=0.7))
    method = qer("none", 0, use_scales=False)
    clip = ActivationClip(ActivationScheme(4, 32, clip_ratio=0.7), is_trained=False)
    linear = trainable_linear(method, built, clip, generator=torch.Generator(), precision=torch.float32)
    assert not [parameter for parameter in linear.parameters() if parameter.requires_grad]
    assert_equal(linear.merged(), built.weights)
    assert linear.merged().activations == built.weights.activations


def test_what_requantization_ships_is_not_what_it_trained_but_what_the_base_quantizer_makes_of_the_sum() -> None:
    built = built_linear(SCHEMES[0])
    linear, x = trained(built, "requantize"), torch.randn(5, IN)
    weight = linear.weight
    assert isinstance(weight, RequantizedWeight)
    product = weight.lora_up.detach() @ weight.lora_down.detach() / 4
    assert torch.allclose(formed(weight), dequantize(built.weights.quantized) + product, atol=1e-6)
    assert_equal(linear.merged(), replace(built.weights, quantized=built.quantize(built.weight + product)))
    assert not torch.equal(linear(x), served(linear.merged(), x))


def test_the_product_has_the_precision_asked_for_and_the_output_that_of_the_input() -> None:
    built = built_linear(SCHEMES[0], None, "bias")
    linear, x = trainable(built, "fixed-point", precision=torch.bfloat16), torch.randn(5, IN)
    bias = built.weights.bias
    assert bias is not None
    wanted = nn.functional.linear(x.bfloat16(), dequantize(built.weights.quantized).bfloat16()).float() + bias
    assert linear(x).dtype == torch.float32
    assert torch.equal(linear(x), wanted)


def scales_gradient(weight: MergedWeight, direction: Tensor) -> Tensor:
    assert weight.log_scale is not None
    (gradient,) = torch.autograd.grad((formed(weight) * direction).sum(), weight.log_scale)
    return gradient.double()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_of_scales_are_those_of_the_float_formula(scheme: QuantScheme) -> None:
    weight = trained(built_linear(scheme), "fixed-point").weight
    assert isinstance(weight, MergedWeight) and weight.log_scale is not None
    merged, direction = weight.merged(), torch.randn(OUT, IN)
    length, width = scheme.group_length(IN), 1e-5
    base_scale = weight.merged().scale.double() / weight.log_scale.detach().double().exp()
    zero = torch.full_like(base_scale, 2 ** (scheme.num_bits - 1))
    zero = zero if merged.zero_point is None else merged.zero_point.double()
    steps = merged.codes.double() - zero.repeat_interleave(length, 1)

    def value(logs: Tensor) -> Tensor:
        """One number per group: its share of the weighted sum of weights."""
        scaled = steps * (base_scale * logs.exp()).repeat_interleave(length, 1)
        return torch.sum((scaled * direction).reshape(OUT, -1, length), 2)

    logs = weight.log_scale.detach().double()
    wanted = (value(logs + width) - value(logs - width)) / (2 * width)
    assert torch.allclose(scales_gradient(weight, direction), wanted, rtol=2e-3, atol=1e-5)


def test_penalties_weigh_levels_by_what_they_do_to_the_output() -> None:
    built = built_linear(SCHEMES[1])
    linear = trained(built, "fixed-point")
    linear(torch.randn(5, IN))
    weight, mean_square = linear.weight, built.statistics.mean_square
    assert isinstance(weight, MergedWeight) and isinstance(weight.codes, TrainableCodes) and mean_square is not None
    lost = whole(weight.codes)[1]
    importance = built.weights.quantized.scale.double().repeat_interleave(32, 1).square() * mean_square
    importance /= importance.mean()
    for found, values in ((linear.penalty_of_rounding, lost.rounding), (linear.penalty_of_overflow, lost.overflow)):
        assert found is not None and values is not None and found.requires_grad
        wanted = float((values.detach().double().square() * importance).mean())
        assert wanted > 0
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        linear(torch.randn(5, IN))
    assert linear.penalty_of_rounding is None and linear.penalty_of_overflow is None


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
@pytest.mark.parametrize("merge", MERGED)
def test_the_merged_layer_survives_the_artifact(merge: str, scheme: QuantScheme, tmp_path: Path) -> None:
    linear = trained(built_linear(scheme, ACTIVATIONS[2], "scale bias rotation"), merge)
    merged, x = linear.merged(), torch.randn(5, IN)
    write_shard(tmp_path / "layer.safetensors", encode_linear("proj", merged))
    with Shard(tmp_path / "layer.safetensors") as shard:
        read = decode_linear("proj", LinearRecord.of(merged, 0.1), shard.read)
    assert_equal(read, merged)
    assert read.activations == merged.activations
    assert torch.equal(served(read, x), linear(x))


@pytest.mark.parametrize("merge", MERGES)
def test_forming_the_weight_once_more_on_the_way_back_changes_no_gradient(merge: str) -> None:
    built, x = built_linear(SCHEMES[1], ACTIVATIONS[1], ""), torch.randn(5, IN)
    gradients = []
    for use_checkpointing in (False, True):
        assert built.weights.activations is not None
        clip = ActivationClip(built.weights.activations, is_trained=True)
        generator = torch.Generator().manual_seed(3)
        linear = trainable_linear(
            qer(merge), built, clip, generator=generator, precision=torch.float32, use_checkpointing=use_checkpointing
        )
        loss = linear(x).square().sum()
        for penalty in (linear.penalty_of_rounding, linear.penalty_of_overflow):
            loss = loss if penalty is None else loss + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: it.grad for name, it in linear.named_parameters() if it.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
