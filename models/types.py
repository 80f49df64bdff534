"""Tensors with their shapes and invariants: what quantizers, reconstructors, the artifact and kernels exchange."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .scheme import ActivationScheme, QuantScheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Codes of one weight matrix with what turns them back into numbers.

    ``int`` and ``mxint``: ``weight[o, i] ~ scale[o, g] * (codes[o, i] - zero_point[o, g])``, ``g = i // group_length``.
    ``mxfp4`` and ``nf4``: ``weight[o, i] ~ scale[o, g] * table[codes[o, i]]``.

    codes:      (out_features, in_features) uint8, values 0..2**num_bits - 1, one code per byte
    scale:      (out_features, num_groups), finite, positive: float16, or for ``mxint`` and ``mxfp4`` bfloat16 powers
        of two
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

    def rows(self, rows: "slice | Tensor") -> "QuantizedWeight":
        """These output rows alone, a slice or indices (n,)."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return QuantizedWeight(self.codes[rows], self.scale[rows], zero_point, self.scheme)

    @property
    def num_stored_bits(self) -> float:
        """Stored bits of codes, scales and zero points."""
        return self.scheme.weight_bits(self.in_features) * self.codes.numel()


Factor: TypeAlias = Tensor | QuantizedWeight
"""One low-rank factor: bfloat16, float16 or float32 as it is, or quantized."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Low-rank term added to the quantized product: ``x_c @ lora_down.T @ lora_up.T``.

    lora_up:   (out_features, rank). Quantized beside a ``lora_down``: held transposed, (rank, out_features), so that
        scales belong to a component and not to an output; quantized on its own: as it is
    lora_down: (rank, in_features), or None: take the first ``rank`` channels of x_c (SERQ's single matrix)
    ``quant.grid.dense_factors`` gives both as plain tensors.
    """

    lora_up: Factor
    lora_down: Factor | None

    @property
    def rank(self) -> int:
        """Number of components, or of channels that a single matrix reads."""
        if isinstance(self.lora_up, Tensor):
            return self.lora_up.shape[1]
        return self.lora_up.in_features if self.lora_down is None else self.lora_up.out_features

    @property
    def num_stored_bits(self) -> float:
        """Stored bits of both factors."""
        factors = (self.lora_up,) if self.lora_down is None else (self.lora_up, self.lora_down)
        return sum(_stored_bits(factor) for factor in factors)


@dataclass(frozen=True, slots=True, eq=False)
class RowRanks:
    """How many leading components of every correction count in each row of a batch; without one, all in every row.

    per_row: (num_rows,) int64, 0 or more; where it is more than a correction's rank, all of that
    largest: the most of any row, known without asking the device
    """

    per_row: Tensor
    largest: int

    def keep(self, reduced: Tensor) -> Tensor:
        """``reduced`` (num_rows, rank) with zeros where a component does not count."""
        components = torch.arange(reduced.shape[1], device=reduced.device)
        return reduced.masked_fill(components >= self.per_row[:, None], 0)


def _stored_bits(factor: Factor) -> float:
    if isinstance(factor, QuantizedWeight):
        return factor.num_stored_bits
    return factor.numel() * factor.element_size() * 8


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """All that one linear layer needs at inference; the unit of the artifact and of a kernel's ``prepare``.

    The layer computes ``x_c @ dequantize(quantized).T + correction(x_c) + bias``, and makes x_c of its input x in the
    order of these fields: divide, gather, rotate, quantize.

    quantized:      codes, scale, zero_point, scheme
    correction:     None for a layer without a low-rank term (plain, or merged QER)
    input_scale:    (in_features,), the input is divided by it; None: as it comes
    channel_order:  (in_features,) int32, input channels are gathered in this order; None: as they come
    rotation_block: width of the Hadamard blocks that the input is multiplied with; 0: not rotated
    activations:    how the input is quantized, last; None: not at all
    bias:           (out_features,) or None
    """

    quantized: QuantizedWeight
    correction: Correction | None = None
    input_scale: Tensor | None = None
    channel_order: Tensor | None = None
    rotation_block: int = 0
    activations: ActivationScheme | None = None
    bias: Tensor | None = None

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight: codes, scales, zero points and factors (the bias is not a weight)."""
        factors = 0 if self.correction is None else self.correction.num_stored_bits
        return self.quantized.scheme.weight_bits(self.quantized.in_features) + factors / self.quantized.codes.numel()


class Statistic(StrEnum):
    """What calibration can accumulate about a linear layer; a quantizer or reconstructor names what it needs."""

    AUTOCORRELATION = "autocorrelation"
    MEAN_SQUARE = "mean_square"
    MEAN_ABS = "mean_abs"
    ABSMAX = "absmax"
    QUANTIZED_AUTOCORRELATION = "quantized_autocorrelation"
    CROSS_CORRELATION = "cross_correlation"
    FISHER = "fisher"
    OUTPUT_GRADIENT = "output_gradient"

    @property
    def needs_gradients(self) -> bool:
        """Taken on the way back through the network, not on the way forth."""
        return self in {Statistic.FISHER, Statistic.OUTPUT_GRADIENT}


QUANTIZED_STATISTICS = frozenset({Statistic.QUANTIZED_AUTOCORRELATION, Statistic.CROSS_CORRELATION})
"""Those of inputs after their quantization; all others are of inputs as they are."""

MATRIX_STATISTICS = QUANTIZED_STATISTICS | {Statistic.AUTOCORRELATION}
"""Those of pairs of channels; the others have one value for each channel."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Statistics of one linear layer over ``num_tokens`` calibration tokens.

    x is the layer's input after division, gathering and rotation, before its quantization; xq after it; xt the input
    of the dense network's layer, treated as x was. Where nothing quantizes, before the layer or at it, all are equal.

    autocorrelation: (in_features, in_features) float64, uncentred E[x^T x]
    mean_square:     (in_features,) float64, E[x_j^2]
    mean_abs:        (in_features,) float64, the largest over calibration batches of the batch mean of |x_j|
        (LQER, arXiv 2402.02446, as its published code computes it)
    absmax:          (in_features,) float64, the largest |x_j|
    quantized_autocorrelation: (in_features, in_features) float64, E[xq^T xq]
    cross_correlation:         (in_features, in_features) float64, E[xq^T xt]
    fisher_rows, fisher_columns: (out_features,), (in_features,) float64, means over the other dimension of the square
        root of F, the mean over sequences of the squared gradient of the weight (LQ-LoRA, arXiv 2311.12023)
    output_gradient: (out_features,) float64, E[g_o^2], g the gradient of the summed nll (nats) by the layer's output,
        over all tokens but the first four of each sequence, which are mostly attention sinks
    input_energy:    (in_features,) float64, E[|g|^2 x_j^2] / E[|g|^2] over the same tokens; comes with output_gradient
    flattening:      (in_features,) float64, what the network was rewritten to have divided x by; not accumulated here
    A statistic that was not asked for is None.
    """

    num_tokens: int
    autocorrelation: Tensor | None = None
    mean_square: Tensor | None = None
    mean_abs: Tensor | None = None
    absmax: Tensor | None = None
    quantized_autocorrelation: Tensor | None = None
    cross_correlation: Tensor | None = None
    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    output_gradient: Tensor | None = None
    input_energy: Tensor | None = None
    flattening: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "InputStatistics":
        """The same statistics, each tensor as ``change`` makes it: elsewhere, or in another type."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return InputStatistics(**(values | changed))


QuantizeFn: TypeAlias = Callable[[Tensor], QuantizedWeight]
"""Weight (out_features, in_features) float32 -> its quantized form."""
