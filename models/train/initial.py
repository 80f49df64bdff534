"""From a layer that the base quantizer made to its trainable form: what the factors start as."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.grid import grouped
from ..quant.weighting import weigh
from ..reconstruct.linalg import weighted_low_rank
from ..reconstruct.merge import (
    SWITCHED_OFF,
    IntegerBase,
    clamp_codes,
    exact_product,
    fixed_point_merge,
    integer_base,
    shift_merge,
)
from ..reconstruct.qer import AUTOMATIC, Qer
from ..reconstruct.statistics import require
from ..types import InputStatistics, LinearWeights, QuantizedWeight, QuantizeFn, Statistic
from .codes import InsideRounding, IntegerFactors, TrainableCodes
from .linear import ActivationClip, TrainableLinear
from .weight import MergedWeight, RequantizedWeight, ScaledWeight

_NUM_SHIFTS = 16


@dataclass(frozen=True, slots=True)
class BuiltLinear:
    """One linear layer as the base quantizer made it, and what it was made from.

    weight:     (out_features, in_features) float32, dense, in the coordinates in which it was quantized
    weights:    the quantized layer
    statistics: of its inputs: mean squares, and for initialization ``qera`` the autocorrelation
    quantize:   the base quantizer, for ``requantize``
    """

    weight: Tensor
    weights: LinearWeights
    statistics: InputStatistics
    quantize: QuantizeFn


def trainable_linear(
    method: Qer,
    built: BuiltLinear,
    clip: ActivationClip | None,
    *,
    generator: torch.Generator,
    precision: torch.dtype,
    use_checkpointing: bool = False,
) -> TrainableLinear:
    """The trainable form of ``built``; as long as nothing is trained it computes what ``built`` does.

    With initialization ``qera`` it starts from a merge that loses less than ``built`` in every output channel it
    touches.

    Args:
        method: its options and rank.
        built: the layer.
        clip: of the input, shared with the layers that read the same; None: activations are not quantized.
        generator: of the random factors, on the CPU.
        precision: of products with activations.
        use_checkpointing: form weights once more on the way back instead of keeping what they were formed from.

    Raises:
        CalibrationError: a statistic is missing.
    """
    weight, base = built.weight, built.weights.quantized
    mean_square = require(built.statistics, Statistic.MEAN_SQUARE, weight.shape[1])
    module: ScaledWeight | RequantizedWeight
    if method.options.merge == "requantize":
        factors = _float_factors(weight, method.rank, 1 / math.sqrt(weight.shape[1]), generator)
        module = RequantizedWeight(weight, base, built.quantize, *factors)
    elif method.options.merge == "none":
        module = ScaledWeight(base, use_scales=method.options.use_scales)
    else:
        codes = trainable_codes(method, weight, base, built.statistics, generator)
        module = MergedWeight(codes, base, use_scales=method.options.use_scales)
    linear = TrainableLinear(
        module,
        built.weights,
        clip,
        mean_square.to(weight.device),
        precision=precision,
        use_checkpointing=use_checkpointing,
    )
    return linear.to(weight.device)


def trainable_codes(
    method: Qer, weight: Tensor, base: QuantizedWeight, statistics: InputStatistics, generator: torch.Generator
) -> TrainableCodes:
    """The codes of ``base`` with the factors of ``method``, which has some, at their start; arguments as above."""
    options, num_bits = method.options, base.scheme.num_bits
    largest = options.largest_factor(num_bits)
    has_fraction = options.merge in {"fixed-point", "inside-rounding"}
    position = positions(weight, base)
    start = integer_base(base.codes, position, options.fraction_bits if has_fraction else 0, base.scheme.max_code)
    if options.merge == "inside-rounding":
        return InsideRounding(start, *_float_factors(weight, method.rank, 1.0, generator))
    usual = options.shift_of(method.rank, num_bits)
    if options.initialization == "qera":
        autocorrelation = require(statistics, Statistic.AUTOCORRELATION, weight.shape[1]).to(weight.device)
        up, down = _solved_factors(position - base.codes, autocorrelation, method.rank, usual, largest)
        product = exact_product(up.round(), down.round())
        is_searched = options.merge == "shift" and options.shift == AUTOMATIC
        candidates = range(max(_NUM_SHIFTS, usual + 2)) if is_searched else [usual]
        shift = _best_shifts(start, product, _OutputError(position, _levels(base), autocorrelation), candidates)
        if bool((shift < SWITCHED_OFF).any()):
            return IntegerFactors(start, options, up, down, shift=shift, largest=largest)
    shift = torch.full((weight.shape[0], 1), usual, dtype=torch.int32)
    up = torch.empty(weight.shape[0], method.rank).uniform_(-largest, largest, generator=generator)
    down = torch.zeros(method.rank, weight.shape[1])
    return IntegerFactors(start, options, up.to(weight.device), down.to(weight.device), shift=shift, largest=largest)


def positions(weight: Tensor, base: QuantizedWeight) -> Tensor:
    """Where the dense weight lies on the base's grid, in levels above its lowest, in the weight's shape, float64."""
    scheme = base.scheme
    middle = float(1 << (scheme.num_bits - 1))
    offset: Tensor | float = middle if base.zero_point is None else base.zero_point.double()[:, :, None]
    return (grouped(weight.double(), scheme) / base.scale.double()[:, :, None] + offset).flatten(1)


def _float_factors(weight: Tensor, rank: int, bound: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A first factor of zeros, a second one within ``bound``: their product is nothing."""
    down = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
    return torch.zeros(weight.shape[0], rank, device=weight.device), down.to(weight.device)


def _solved_factors(
    missed: Tensor, autocorrelation: Tensor, rank: int, shift: int, largest: int
) -> tuple[Tensor, Tensor]:
    """QERA-exact's factors of ``missed`` levels as latents: their product is in steps of ``2^-shift`` levels."""
    up, down = weighted_low_rank(missed, autocorrelation, rank)
    reach_up, reach_down = up.abs().amax(0), down.abs().amax(1)
    is_empty = (reach_up == 0) | (reach_down == 0)
    balance = torch.where(is_empty, 0.0, (reach_down / torch.where(is_empty, 1.0, reach_up)).sqrt())
    factor = balance * 2.0 ** (shift / 2)
    inverse = torch.where(is_empty, 0.0, 2.0 ** (shift / 2) / torch.where(is_empty, 1.0, balance))
    # Rounded to float32 here, as they are held: a latent near a half could turn into another integer later.
    factors = (up * factor).float(), (down * inverse[:, None]).float()
    return factors[0].clamp(-largest, largest), factors[1].clamp(-largest, largest)


@dataclass(frozen=True, slots=True)
class _OutputError:
    """What codes do to the outputs: where the weight lies, in levels, and what each of these is worth."""

    position: Tensor
    level: Tensor
    autocorrelation: Tensor

    def of(self, codes: Tensor) -> Tensor:
        """Mean squared error of each output channel: (out_features,) float64."""
        missed = (self.position - codes.double()) * self.level
        return (weigh(missed, self.autocorrelation) * missed).sum(1)


def _levels(base: QuantizedWeight) -> Tensor:
    """Value of one level, in the weight's shape, float64."""
    return base.scale.double().repeat_interleave(base.scheme.group_length(base.in_features), 1)


def _best_shifts(base: IntegerBase, product: Tensor, error: _OutputError, candidates: Sequence[int]) -> Tensor:
    """Of ``candidates`` the shift of each output channel with the least output error, (out_features, 1) int32.

    ``SWITCHED_OFF`` where no merge is better than none.
    """
    is_fixed = base.fraction is not None
    best = base.codes.new_full((len(base.codes), 1), SWITCHED_OFF)
    least = error.of(base.codes)
    for shift in candidates:
        merged = fixed_point_merge(base, product, shift) if is_fixed else shift_merge(base, product, shift)
        losses = error.of(clamp_codes(merged, base))
        is_better = losses < least
        best[is_better] = shift
        least = torch.where(is_better, losses, least)
    return best
