"""Tensors with their shapes and invariants: what quantizers, reconstructors, the artifact and kernels exchange."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from torch import Tensor

from .config import QuantScheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Integer codes of one weight matrix with what turns them back into numbers.

    ``weight[o, i] ~ scale[o, g] * (codes[o, i] - zero_point[o, g])`` with ``g = i // group_length``.

    codes:      (out_features, in_features) uint8, values 0..2**num_bits - 1, one code per byte
    scale:      (out_features, num_groups) float16, finite, positive
    zero_point: (out_features, num_groups) uint8, values 0..2**num_bits - 1; None when symmetric: 2**(num_bits - 1)
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.codes.shape[1]


@dataclass(frozen=True, slots=True)
class Correction:
    """Low-rank term added to the quantized product: ``x_c @ lora_down.T @ lora_up.T``.

    lora_up:   (out_features, rank)
    lora_down: (rank, in_features), or None: take the first ``rank`` channels of x_c (SERQ's single matrix)
    """

    lora_up: Tensor
    lora_down: Tensor | None

    @property
    def rank(self) -> int:
        """Columns of ``lora_up``."""
        return self.lora_up.shape[1]

    @property
    def num_bits(self) -> int:
        """Stored bits of both factors."""
        factors = (self.lora_up,) if self.lora_down is None else (self.lora_up, self.lora_down)
        return sum(factor.numel() * factor.element_size() * 8 for factor in factors)


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """All that one linear layer needs at inference; the unit of the artifact and of a kernel's ``prepare``.

    quantized:     codes, scale, zero_point, scheme
    correction:    None for a layer without a low-rank term (plain, or merged QER)
    input_scale:   (in_features,), the input is divided by it first; None: not flattened
    channel_order: (in_features,) int32, input channels are gathered in this order first; None: as they come
    bias:          (out_features,) or None
    """

    quantized: QuantizedWeight
    correction: Correction | None = None
    input_scale: Tensor | None = None
    channel_order: Tensor | None = None
    bias: Tensor | None = None

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight: codes, scales, zero points and factors (the bias is not a weight)."""
        quantized = self.quantized
        base = quantized.scheme.weight_bits(quantized.in_features)
        factors = 0 if self.correction is None else self.correction.num_bits
        return base + factors / (quantized.out_features * quantized.in_features)


class Statistic(StrEnum):
    """What calibration can accumulate about the inputs of a linear layer; a reconstructor names what it needs."""

    AUTOCORRELATION = "autocorrelation"
    MEAN_SQUARE = "mean_square"
    MEAN_ABS = "mean_abs"


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Statistics of the inputs x of one linear layer over ``num_tokens`` calibration tokens.

    autocorrelation: (in_features, in_features) float64, uncentred E[x^T x]
    mean_square:     (in_features,) float64, E[x_j^2]
    mean_abs:        (in_features,) float64, the largest over calibration batches of the batch mean of |x_j|
        (LQER, arXiv 2402.02446, as its published code computes it)
    A statistic that was not asked for is None.
    """

    num_tokens: int
    autocorrelation: Tensor | None = None
    mean_square: Tensor | None = None
    mean_abs: Tensor | None = None


QuantizeFn: TypeAlias = Callable[[Tensor], QuantizedWeight]
"""Weight (out_features, in_features) float32 -> its quantized form."""
