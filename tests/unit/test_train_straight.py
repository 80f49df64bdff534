"""Straight-through functions: values bit for bit, gradients of the stand-ins written out and by finite differences."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.quant.activation import quantize_activations
from models.scheme import ActivationScheme
from models.train.linear import ActivationClip
from models.train.straight import bounded_clip, quantize_straight, straight, straight_round

INT = [
    ActivationScheme(bits, size, is_symmetric)
    for bits, size, is_symmetric in itertools.product((3, 4, 8), (-1, 32), (False, True))
]
BLOCK = [ActivationScheme(4, 32, format="mxint"), ActivationScheme(4, 32, format="mxfp4")]


def inputs(num_tokens: int = 6) -> Tensor:
    """Tokens of different sizes, channels of both signs, one token of zeros and one without negative values."""
    x = torch.randn(num_tokens, 64) * torch.logspace(-2, 2, num_tokens)[:, None]
    x[1] = 0
    x[2].abs_()
    return x


def quantized(x: Tensor, scheme: ActivationScheme, ratio: float) -> Tensor:
    return quantize_activations(x, replace(scheme, clip_ratio=ratio))


def ends(x: Tensor, scheme: ActivationScheme, ratio: float) -> tuple[Tensor, Tensor]:
    """What the grid of each value spans, float64."""
    length = x.shape[1] if scheme.group_size == -1 else scheme.group_size
    groups = x.double().unfold(1, length, length)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return (low * ratio).repeat_interleave(length, 1), (high * ratio).repeat_interleave(length, 1)


@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_a_value_passes_bit_for_bit_and_its_gradient_goes_to_the_stand_in(values: list[float]) -> None:
    value = torch.tensor(values)
    surrogate = torch.randn(len(values)).requires_grad_()
    result = straight(surrogate, value)
    assert torch.equal(result.view(torch.int32), value.view(torch.int32))
    assert result.data_ptr() != value.data_ptr()
    direction = torch.randn(len(values))
    (result * direction).sum().backward()  # type: ignore[no-untyped-call]
    assert surrogate.grad is not None and torch.equal(surrogate.grad, direction)


def test_integers_take_the_type_of_the_stand_in() -> None:
    surrogate = torch.zeros(3, requires_grad=True)
    assert straight(surrogate, torch.tensor([-5, 0, 2**24], dtype=torch.int32)).tolist() == [-5.0, 0.0, 2.0**24]
    assert straight(surrogate, torch.ones(3).half()).dtype == torch.float32


def test_rounding_is_to_the_nearest_integer_and_the_gradient_passes() -> None:
    values = torch.tensor([-1.5, -0.49, 0.5, 1.2, 2.5], requires_grad=True)
    rounded = straight_round(values)
    assert rounded.tolist() == [round(value) for value in values.tolist()]
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None and values.grad.tolist() == [1.0] * 5


@pytest.mark.parametrize("scheme", INT, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.55, 0.1])
def test_quantized_values_are_those_of_serving_bit_for_bit(scheme: ActivationScheme, ratio: float) -> None:
    x = inputs()
    clip = torch.tensor(ratio, requires_grad=True)
    wanted = quantized(x, scheme, float(clip.detach()))
    assert torch.equal(quantize_straight(x, scheme, clip), wanted)
    assert torch.equal(quantize_straight(x.requires_grad_(), scheme, clip), wanted)
    assert torch.equal(quantized(x, scheme, ratio), wanted)  # float32 is precise enough for the ratio


@pytest.mark.parametrize("scheme", BLOCK, ids=str)
def test_block_formats_pass_too_with_gradients_everywhere(scheme: ActivationScheme) -> None:
    x = inputs().requires_grad_()
    clip = ActivationClip(scheme, is_trained=True)
    found = clip(x)
    assert torch.equal(found, quantize_activations(x.detach(), scheme))
    assert not clip.ratio.requires_grad and clip.merged == scheme
    direction = torch.randn(x.shape)
    (gradient,) = torch.autograd.grad(found, x, direction)
    assert torch.equal(gradient, direction)


@pytest.mark.parametrize("scheme", INT, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.3])
def test_the_gradient_of_an_input_passes_within_the_ends_of_its_grid_only(
    scheme: ActivationScheme, ratio: float
) -> None:
    x = inputs()
    low, high = ends(x, scheme, ratio)
    is_inside = (x >= low) & (x <= high)
    assert is_inside.any() and bool(is_inside.all()) == (ratio == 1)
    direction = torch.randn(x.shape)
    (gradient,) = torch.autograd.grad(
        quantize_straight(x.requires_grad_(), scheme, torch.tensor(ratio)), x, direction
    )  # fmt: skip
    assert torch.equal(gradient, direction * is_inside)


def clip_gradient(x: Tensor, scheme: ActivationScheme, ratio: float, direction: Tensor) -> float:
    clip = torch.tensor(ratio, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantize_straight(x, scheme, clip), clip, direction)
    return float(gradient)


def slope(function: Callable[[float], Tensor], at: float, width: float) -> float:
    return float((function(at + width) - function(at - width)) / (2 * width))


@pytest.mark.parametrize("scheme", INT, ids=str)
@pytest.mark.parametrize("ratio", [0.7, 0.4])
def test_clipped_values_move_with_the_ends_of_the_grid(scheme: ActivationScheme, ratio: float) -> None:
    """Finite differences of the very function that serves: the codes of what lies beyond an end do not flip."""
    x = inputs()
    low, high = ends(x, scheme, ratio)
    margin = (high - low) / 10
    is_beyond = (x < low - margin) | (x > high + margin)
    assert is_beyond.any()
    direction = torch.randn(x.shape) * is_beyond

    def served(at: float) -> Tensor:
        return torch.sum(quantized(x, scheme, at).double() * direction)

    assert clip_gradient(x, scheme, ratio, direction) == pytest.approx(slope(served, ratio, 2**-6), rel=1e-4)


@pytest.mark.parametrize("scheme", INT, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_values_inside_lend_the_ratio_what_rounding_them_costs(scheme: ActivationScheme, ratio: float) -> None:
    """Finite differences of the smooth formula ``x + scale (q - x / scale)``, whose bracket is held."""
    x = inputs()[[0, 3, 4, 5]]
    low, high = ends(x, scheme, ratio)
    direction = torch.randn(x.shape) * ((x >= low) & (x <= high))
    step = (high - low) / (2 * (2 ** (scheme.num_bits - 1) - 1) if scheme.is_symmetric else 2**scheme.num_bits - 1)
    bracket = (quantized(x, scheme, ratio).double() - x) / step

    def smooth(at: float) -> Tensor:
        return torch.sum((x + step * at / ratio * bracket) * direction)

    found = clip_gradient(x, scheme, ratio, direction)
    assert found == pytest.approx(slope(smooth, ratio, 2**-10), rel=1e-3, abs=1e-3)


def test_the_gradient_of_the_ratio_is_a_scalar_whatever_the_type_of_the_input() -> None:
    clip = torch.tensor(0.8, requires_grad=True)
    found = quantize_straight(inputs().bfloat16(), INT[0], clip)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()  # type: ignore[no-untyped-call]
    assert clip.grad is not None
    assert (clip.grad.shape, clip.grad.dtype) == (torch.Size([]), torch.float32)
    assert float(clip.grad) > 0


@pytest.mark.parametrize(
    ("start", "now", "counts"), [(1.0, 2.0, 1.0), (1.0, -3.0, 0.1), (0.9, 0.05, 0.1), (0.05, 0.01, 0.05), (1, 0.5, 0.5)]
)
def test_a_clip_ratio_stays_between_one_and_a_tenth_or_its_lower_start(start: float, now: float, counts: float) -> None:
    scheme = ActivationScheme(4, 32, clip_ratio=start)
    assert float(bounded_clip(torch.tensor(now), scheme)) == pytest.approx(counts, rel=1e-6)
    x = inputs()
    assert torch.equal(quantize_straight(x, scheme, torch.tensor(now)), quantized(x, scheme, counts))
    clip = ActivationClip(scheme, is_trained=True)
    with torch.no_grad():
        clip.ratio.fill_(now)
    assert clip.merged.clip_ratio == pytest.approx(counts, rel=1e-6)
    assert torch.equal(clip(x), quantize_activations(x, clip.merged))


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.03])
@pytest.mark.parametrize("is_trained", [False, True])
def test_an_untrained_clip_is_the_scheme_that_it_came_from(ratio: float, is_trained: bool) -> None:
    scheme = ActivationScheme(4, -1, clip_ratio=ratio)
    clip = ActivationClip(scheme, is_trained=is_trained)
    x = inputs()
    assert torch.equal(clip(x), quantize_activations(x, scheme))
    assert torch.equal(quantize_activations(x, clip.merged), quantize_activations(x, scheme))
    assert clip.merged == scheme or is_trained
