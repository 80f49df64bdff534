"""What a reconstruction method is, and the template that all closed-form ones share.

A closed-form method answers one question: which weighting of the channels defines the error that the correction
removes. Everything else (quantize, take the error, approximate it, store the factors) is the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..config import FactorDtype, ReconstructConfig
from ..errors import CalibrationError, SchemeError
from ..quant.factors import check_factors, store_factors
from ..quant.grid import dense_factors, dequantize
from ..types import Correction, InputStatistics, LinearWeights, QuantizedWeight, QuantizeFn, Statistic
from .linalg import weighted_low_rank
from .options import NoOptions, parse_options

_NOT_PER_INPUT_CHANNEL = {"num_tokens", "fisher_rows", "output_gradient"}


class Reconstructor(Protocol):
    """Turns one dense weight into codes and the correction of their error."""

    @property
    def method(self) -> str:
        """Id, as the user names it."""
        ...

    @property
    def requires(self) -> frozenset[Statistic]:
        """What calibration must accumulate for the method and its options, nothing more."""
        ...

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when a weight of this shape cannot be corrected."""
        ...

    def channel_order(self, weight: Tensor, statistics: InputStatistics) -> Tensor | None:
        """Order (in_features,) int32 in which ``reconstruct`` wants the input channels; None: as they come.

        Called first. The caller gathers the columns of the weight and the statistics (``permute_statistics``) in this
        order, binds the quantizer to those, and records the order in ``LinearWeights.channel_order``.
        """
        ...

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Quantize and correct ``weight`` (out_features, in_features) float32.

        Raises:
            SchemeError: a weight that ``quantize`` refuses, or a rank above its smaller dimension.
            CalibrationError: a required statistic that is missing, of the wrong shape, or not finite.
        """
        ...


class MethodBase(ABC):
    """Rank, factor dtype and options of a method that makes a correction, and the checks of the first two."""

    method: ClassVar[str]
    requires: frozenset[Statistic] = frozenset()
    options_type: ClassVar[type[Any]] = NoOptions
    options: object

    def __init__(self, config: ReconstructConfig) -> None:
        self.rank = config.rank
        self.factor_dtype = config.factor_dtype
        self.options = parse_options(config, self.options_type)

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError when rank or factor dtype do not suit the shape of the weight of layer ``where``."""
        check_rank(self.rank, self.factor_dtype, (out_features, in_features), where)

    def channel_order(self, weight: Tensor, statistics: InputStatistics) -> Tensor | None:
        """None: a correction of two factors reads every channel, whatever their order."""
        return None

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Quantize ``weight`` (out_features, in_features) and correct it; rank 0 leaves it uncorrected."""
        self.check(weight.shape[0], weight.shape[1], "weight")
        if self.rank == 0:
            return LinearWeights(quantize(weight))
        return self._correct(weight, statistics, quantize)

    @abstractmethod
    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """``reconstruct`` for a rank of 1 or more, after the checks."""


class LowRankReconstructor(MethodBase):
    """The template: quantize, then approximate the weight error in the norm that the weightings define."""

    @abstractmethod
    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """R of the norm ``tr(D E R E^T)``: None, a diagonal (in_features,), or (in_features, in_features); float64."""

    def output_weighting(self, statistics: InputStatistics, out_features: int) -> Tensor | None:
        """Diagonal D of the same norm, (out_features,) float64; None: every output channel counts the same."""
        return None

    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        quantized = quantize(weight)
        weighting = self.weighting(statistics, weight.shape[1])
        output_weighting = self.output_weighting(statistics, weight.shape[0])
        error = residual(weight, quantized)
        factors = weighted_low_rank(error, weighting, self.rank, output_weighting)
        return LinearWeights(quantized, store_factors(*factors, self.factor_dtype, error, weighting))


def check_rank(rank: int, factor_dtype: FactorDtype, shape: Sequence[int], where: str) -> None:
    """Check that a weight of ``shape`` (out_features, in_features) can have a correction of two factors of ``rank``.

    Raises:
        SchemeError: it is above the smaller dimension, or groups of ``factor_dtype`` do not tile the factors; names the
            layer ``where``.
    """
    out_features, in_features = shape
    largest = min(shape)
    if rank > largest:
        raise SchemeError(
            f"{where}: rank {rank} is above the smaller dimension of its {out_features} x {in_features} weight; "
            f"choose at most {largest}"
        )
    if rank:
        check_factors(factor_dtype, out_features, in_features, where)


def residual(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """What the codes miss: (out_features, in_features) float32, in the memory of the dequantized weight."""
    return dequantize(quantized).neg_().add_(weight)


def stored_product(correction: Correction, dtype: torch.dtype) -> Tensor:
    """What the two factors of ``correction`` amount to as they are stored, (out_features, in_features)."""
    lora_up, lora_down = dense_factors(correction)
    assert lora_down is not None  # noqa: S101 - only SERQ has a single factor
    return (lora_up.double() @ lora_down.double()).to(dtype)


def permute_statistics(statistics: InputStatistics, order: Tensor) -> InputStatistics:
    """Statistics of the same layer once its input channels are gathered in ``order`` (in_features,).

    Raises:
        CalibrationError: a statistic of another number of channels.
    """
    names = [field.name for field in fields(statistics) if field.name not in _NOT_PER_INPUT_CHANNEL]
    permuted: dict[str, Any] = {name: _permuted(name, getattr(statistics, name), order.long()) for name in names}
    return replace(statistics, **permuted)


def _permuted(name: str, values: Tensor | None, order: Tensor) -> Tensor | None:
    if values is None:
        return None
    if any(length != len(order) for length in values.shape):
        raise CalibrationError(f"the statistic {name} has shape {tuple(values.shape)}; expected {len(order)} channels")
    order = order.to(values.device)
    return values[order] if values.dim() == 1 else values[order[:, None], order]
