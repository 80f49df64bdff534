"""Layers on which reconstruction methods are tried, with every statistic, and the steps that a build takes."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from models.config import Option, ReconstructConfig
from models.quant.grid import dequantize
from models.quant.rtn import quantize_rtn
from models.reconstruct import get_reconstructor
from models.reconstruct.base import permute_statistics
from models.reconstruct.loss import stored_weight
from models.scheme import QuantScheme
from models.types import InputStatistics, LinearWeights, QuantizedWeight

SCHEME = QuantScheme(3, 32)
CASES = ["healthy", "tall", "dead channel", "constant column", "few tokens", "no error"]


def quantize(weight: Tensor) -> QuantizedWeight:
    return quantize_rtn(weight, SCHEME)


@dataclass
class Case:
    weight: Tensor
    statistics: InputStatistics

    @property
    def base_error(self) -> Tensor:
        return (self.weight - dequantize(quantize(self.weight))).double()


def correlated_inputs(num_tokens: int, num_channels: int = 64) -> Tensor:
    """Tokens (num_tokens, num_channels) float64 with principal components over three orders of magnitude."""
    rotation, _triangle = torch.linalg.qr(torch.randn(num_channels, num_channels, dtype=torch.float64))
    sizes = torch.logspace(1, -2, num_channels, dtype=torch.float64)
    return torch.randn(num_tokens, num_channels, dtype=torch.float64) * sizes @ rotation


def coarse(x: Tensor) -> Tensor:
    """As an input quantizer of few bits leaves the tokens; small channels round to zero always."""
    step = x.abs().amax(1, keepdim=True) / 7
    return (x / step).round() * step


def all_statistics(x: Tensor, gradient: Tensor) -> InputStatistics:
    """Every statistic of inputs ``x`` (num_tokens, in_features) and output gradients (num_tokens, out_features)."""
    seen = coarse(x)
    fisher = (gradient.T @ x / len(x)).square().sqrt()
    token_weights = gradient.square().sum(1)
    return InputStatistics(
        num_tokens=len(x),
        autocorrelation=x.T @ x / len(x),
        mean_square=x.square().mean(0),
        mean_abs=x.abs().mean(0),
        absmax=x.abs().amax(0),
        quantized_autocorrelation=seen.T @ seen / len(x),
        cross_correlation=seen.T @ x / len(x),
        fisher_rows=fisher.mean(1),
        fisher_columns=fisher.mean(0),
        output_gradient=gradient.square().mean(0),
        input_energy=token_weights @ x.square() / token_weights.sum(),
    )


def make_case(name: str) -> Case:
    """A layer of 64 input channels, healthy or with what real ones have at their worst; the same whenever asked for."""
    return deepcopy(_cached_case(name))


@cache
def _cached_case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _new_case(name)


def _new_case(name: str) -> Case:
    shape = (96, 64) if name == "tall" else (48, 64)
    weight = torch.randn(shape) * 0.05
    x = correlated_inputs(10 if name == "few tokens" else 400)
    gradient = torch.randn(len(x), shape[0], dtype=torch.float64) * torch.logspace(0, -2, shape[0])
    if name == "dead channel":
        x[:, 5] = 0
        gradient[:, 7] = 0
    if name == "constant column":
        weight[:, 9] = 0.03
        weight[:, 11] = 0
    if name == "no error":
        weight = torch.zeros(shape)
    return Case(weight, all_statistics(x, gradient))


def config_of(method: str, rank: int = 8, factor_dtype: str = "float32", **options: Option) -> ReconstructConfig:
    return ReconstructConfig(method, rank, factor_dtype, options=options)


def build(case: Case, config: ReconstructConfig) -> tuple[LinearWeights, Case]:
    """What the method makes of the layer, and the layer in the channel order that it asked for."""
    reconstructor = get_reconstructor(config)
    order = reconstructor.channel_order(case.weight, case.statistics)
    if order is not None:
        case = Case(case.weight[:, order], permute_statistics(case.statistics, order))
    return reconstructor.reconstruct(case.weight, case.statistics, quantize), case


def remaining_error(case: Case, config: ReconstructConfig) -> Tensor:
    """Dense weight minus codes and correction, float64, in the original order of channels."""
    weights, ordered = build(case, config)
    order = get_reconstructor(config).channel_order(case.weight, case.statistics)
    error = ordered.weight.double() - stored_weight(weights)
    return error if order is None else torch.empty_like(error).index_copy_(1, order.long(), error)


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def without(case: Case, **statistics: Tensor | None) -> Case:
    """The same layer with other statistics in place of its own."""
    return replace(case, statistics=replace(case.statistics, **statistics))
