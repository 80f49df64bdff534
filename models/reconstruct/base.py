"""What a reconstruction method is, and the template that all closed-form ones share.

A method answers one question: which weighting of the input channels defines the error that the correction removes.
Everything else (quantize, take the error, approximate it, cast the factors) is the same for all of them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..config import ReconstructConfig
from ..errors import CalibrationError, SchemeError
from ..quant.affine import dequantize
from ..types import Correction, InputStatistics, LinearWeights, QuantizeFn, Statistic
from .linalg import balance, weighted_low_rank


class Reconstructor(Protocol):
    """Turns one dense weight into codes and the correction of their error.

    method:   id, as the user names it
    requires: what calibration must accumulate for it, nothing more
    """

    method: ClassVar[str]
    requires: ClassVar[frozenset[Statistic]]

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when a weight of this shape cannot be corrected."""
        ...

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Quantize and correct ``weight`` (out_features, in_features) float32.

        Raises:
            SchemeError: a weight that ``quantize`` refuses, or a rank above its smaller dimension.
            CalibrationError: a required statistic that is missing, of the wrong shape, or not finite.
        """
        ...


class LowRankReconstructor(ABC):
    """The template: quantize, then approximate the weight error in the norm that ``weighting`` defines."""

    method: ClassVar[str]
    requires: ClassVar[frozenset[Statistic]]
    is_balanced: ClassVar[bool] = False

    def __init__(self, config: ReconstructConfig) -> None:
        self.rank = config.rank
        self.factor_dtype: torch.dtype = getattr(torch, config.factor_dtype)

    @abstractmethod
    def weighting(self, statistics: InputStatistics, in_features: int) -> Tensor | None:
        """R of the norm ``tr(E R E^T)``: None, a diagonal (in_features,), or (in_features, in_features); float64."""

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError when the rank is above the smaller dimension of the weight of layer ``where``."""
        largest = min(out_features, in_features)
        if self.rank > largest:
            raise SchemeError(
                f"{where}: rank {self.rank} is above the smaller dimension of its {out_features} x {in_features} "
                f"weight; choose at most {largest}"
            )

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """Quantize ``weight`` (out_features, in_features) and correct it; rank 0 leaves it uncorrected."""
        self.check(weight.shape[0], weight.shape[1], "weight")
        quantized = quantize(weight)
        if self.rank == 0:
            return LinearWeights(quantized)
        weighting = self.weighting(statistics, weight.shape[1])
        factors = weighted_low_rank(weight - dequantize(quantized), weighting, self.rank)
        lora_up, lora_down = balance(*factors) if self.is_balanced else factors
        correction = Correction(self._stored(lora_up), self._stored(lora_down))
        return LinearWeights(quantized, correction)

    def _stored(self, factor: Tensor) -> Tensor:
        return factor.to(self.factor_dtype).contiguous()


def require(statistics: InputStatistics, statistic: Statistic, in_features: int) -> Tensor:
    """The named statistic in float64, checked.

    Raises:
        CalibrationError: it is missing, has the wrong shape, is not finite or negative where it cannot be, or is an
            autocorrelation that is not symmetric.
    """
    values: Tensor | None = getattr(statistics, statistic.value)
    if values is None:
        raise CalibrationError(f"the statistic {statistic} was not collected; calibrate for a method that requires it")
    expected = (in_features,) * (2 if statistic is Statistic.AUTOCORRELATION else 1)
    if tuple(values.shape) != expected:
        raise CalibrationError(f"the statistic {statistic} has shape {tuple(values.shape)}; expected {expected}")
    for rows in torch.split(values, 1024):
        if not rows.isfinite().all():
            raise CalibrationError(
                f"the statistic {statistic} is not finite; look for inf or nan in the activations of the checkpoint "
                f"(half-precision overflow is the usual cause: calibrate in float32)"
            )
    if (values.diagonal() if values.dim() == 2 else values).min() < 0:
        raise CalibrationError(f"the statistic {statistic} has a negative entry where only squares are summed")
    if values.dim() == 2:
        _check_symmetric(values, statistic)
    return values.double()


def _check_symmetric(matrix: Tensor, statistic: Statistic) -> None:
    tolerance = 1e-4 * float(matrix.diagonal().max())
    for start in range(0, matrix.shape[0], 1024):
        rows, columns = matrix[start : start + 1024], matrix[:, start : start + 1024].T
        if float((rows - columns).abs().max()) > tolerance:
            raise CalibrationError(f"the statistic {statistic} is not symmetric; it was not accumulated as E[x^T x]")
