"""The base quantizers behind one protocol: what each needs to know, and what it does to a weight once it knows."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, Protocol

from torch import Tensor, stack

from ..config import QuantizerConfig
from ..errors import CalibrationError
from ..scheme import QuantScheme
from ..types import InputStatistics, QuantizedWeight, QuantizeFn, Statistic
from .checks import check_weight
from .clip import search_grid
from .gptq import HessianFactor, factorize, quantize_gptq
from .grid import quantize
from .rtn import quantize_rtn


class Quantizer(Protocol):
    """Chooses the codes of a weight.

    requires: what calibration must accumulate for it, nothing more
    """

    requires: ClassVar[frozenset[Statistic]]

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when rows of ``in_features`` cannot be quantized."""
        ...

    def bind(self, statistics: InputStatistics) -> QuantizeFn:
        """The function that quantizes the weights of one input; bind once for all layers that share it.

        The function raises SchemeError for a weight that the scheme cannot hold.

        Raises:
            CalibrationError: a required statistic that is missing, not finite or of the wrong shape.
        """
        ...


def get_quantizer(config: QuantizerConfig, scheme: QuantScheme) -> Quantizer:
    """The quantizer that ``config`` asks for, to the number format ``scheme``."""
    if config.method == "gptq":
        return Gptq(scheme, config)
    return ClippedRounding(scheme) if config.use_clip_search else Rounding(scheme)


@dataclass(frozen=True)
class Rounding:
    """Round to nearest on the grid that spans each group: looks at nothing but the weight."""

    requires: ClassVar[frozenset[Statistic]] = frozenset()
    scheme: QuantScheme

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError when the groups do not tile a row."""
        self.scheme.check(in_features, where)

    def bind(self, statistics: InputStatistics) -> QuantizeFn:
        """The same function whatever the inputs are."""
        return partial(quantize_rtn, scheme=self.scheme)


@dataclass(frozen=True)
class ClippedRounding:
    """Round to nearest on the grid of each group with the least error weighted by the mean squares of the inputs."""

    requires: ClassVar[frozenset[Statistic]] = frozenset({Statistic.MEAN_SQUARE})
    scheme: QuantScheme

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError when the groups do not tile a row."""
        self.scheme.check(in_features, where)

    def bind(self, statistics: InputStatistics) -> QuantizeFn:
        """Takes the diagonal of the autocorrelation where there are no mean squares: it is the same thing."""
        given = statistics.mean_square
        if given is None and statistics.autocorrelation is not None:
            given = statistics.autocorrelation.diagonal()
        mean_square = _checked(given, Statistic.MEAN_SQUARE)

        def quantize_clipped(weight: Tensor) -> QuantizedWeight:
            check_weight(weight, self.scheme)
            _check_channels(weight, mean_square, Statistic.MEAN_SQUARE)
            return quantize(weight.float(), *search_grid(weight, self.scheme, mean_square), self.scheme)

        return quantize_clipped


@dataclass(frozen=True)
class Gptq:
    """Each input channel makes up for the rounding of those before it: GPTQ (arXiv 2210.17323)."""

    requires: ClassVar[frozenset[Statistic]] = frozenset({Statistic.AUTOCORRELATION})
    scheme: QuantScheme
    config: QuantizerConfig

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError when the groups do not tile a row."""
        self.scheme.check(in_features, where)

    def bind(self, statistics: InputStatistics) -> QuantizeFn:
        """Factors the autocorrelation when the first weight comes, and keeps the factor for the others."""
        autocorrelation = _checked(statistics.autocorrelation, Statistic.AUTOCORRELATION)
        config = self.config

        @cache
        def factor() -> HessianFactor:
            return factorize(autocorrelation, config.damping, use_act_order=config.use_act_order)

        def quantize_compensating(weight: Tensor) -> QuantizedWeight:
            check_weight(weight, self.scheme)
            _check_channels(weight, autocorrelation, Statistic.AUTOCORRELATION)
            return quantize_gptq(weight, self.scheme, factor(), use_clip_search=config.use_clip_search)

        return quantize_compensating


def _checked(values: Tensor | None, statistic: Statistic) -> Tensor:
    if values is None:
        raise CalibrationError(
            f"the quantizer needs the statistic {statistic.value}, which was not collected: calibrate for it, "
            "or choose quantizer rtn without clip search"
        )
    if values.dim() > 1 and values.shape[0] != values.shape[1]:
        raise CalibrationError(f"the statistic {statistic.value} is not square but of shape {tuple(values.shape)}")
    if not bool(stack(values.aminmax()).isfinite().all()):
        raise CalibrationError(
            f"the statistic {statistic.value} is not finite; look for inf or nan in the activations of the checkpoint"
        )
    if float((values.diagonal() if values.dim() > 1 else values).min()) < 0:
        raise CalibrationError(f"the statistic {statistic.value} has a negative entry where only squares are summed")
    return values


def _check_channels(weight: Tensor, values: Tensor, statistic: Statistic) -> None:
    if weight.shape[1] != len(values):
        raise CalibrationError(
            f"the statistic {statistic.value} is of {len(values)} input channels, the weight has {weight.shape[1]}"
        )
