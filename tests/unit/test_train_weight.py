"""Codes that stay as they are under scales that learn: the weight is the dequantized one, its gradient autograd's."""

import pytest
import torch
from torch import Tensor

from models.quant.grid import dequantize, grouped
from models.scheme import QuantScheme
from models.train import codes
from models.train.weight import ScaledWeight
from models.types import QuantizedWeight
from tests.support.qer_cases import SCHEMES, off_grid_layer


def scaled(scheme: QuantScheme, shape: tuple[int, int] = (12, 64)) -> tuple[ScaledWeight, QuantizedWeight]:
    """Scales that have been trained a little, and the base."""
    _, base = off_grid_layer(scheme, shape)
    weight = ScaledWeight(base, use_scales=True)
    assert weight.log_scale is not None
    with torch.no_grad():
        weight.log_scale.uniform_(-0.3, 0.3)
    return weight, base


def formed(weight: ScaledWeight, dtype: torch.dtype) -> Tensor:
    (part,) = weight.parts(dtype)
    assert part.penalties.rounding is None and part.penalties.overflow is None
    return part.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_multiplied_with_is_what_ships(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight, base = scaled(scheme)
    shipped = weight.merged()
    assert torch.equal(shipped.codes, base.codes)
    assert not torch.equal(shipped.scale, base.scale)
    assert torch.equal(formed(weight, dtype), dequantize(shipped).to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_scales_to_train_it_is_the_base_and_has_no_parameters(scheme: QuantScheme) -> None:
    _, base = off_grid_layer(scheme)
    weight = ScaledWeight(base, use_scales=False)
    assert not list(weight.parameters())
    assert torch.equal(formed(weight, torch.float32), dequantize(base))


@pytest.mark.parametrize("rows_at_once", [1, 5, 100])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_gradient_of_the_scales_is_that_of_the_definition(
    scheme: QuantScheme, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "values_at_once", lambda _device: rows_at_once * 64)
    weight, base = scaled(scheme)
    assert weight.log_scale is not None
    arriving = torch.randn(12, 64)
    (found,) = torch.autograd.grad(formed(weight, torch.float32), weight.log_scale, arriving)
    # d/dlog s of s (codes - z), s as it ships, over the group.
    ones = QuantizedWeight(base.codes, torch.ones_like(base.scale), base.zero_point, scheme)
    slopes = grouped(dequantize(ones).double() * arriving.double(), scheme).sum(-1)
    wanted = slopes * base.scale.double() * weight.log_scale.detach().double().exp()
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
