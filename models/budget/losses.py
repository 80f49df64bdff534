"""Predicted loss of every choice that a budget has for a linear layer, from one decomposition per layer.

One width is looked at in full: its rounding errors, what the base quantizer makes of them, and what is left of that at
every rank. The other widths are taken to lose in the same proportions; how much more or less in all is measured on a
sample of rows.

Not modelled: rounding of the factors, quantized activations, and that methods which change the weight before it is
quantized (loftq, srr, lq-lora) make its error smaller; these are predicted as the plain correction in their norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import BuildConfig
from ..quant.gptq import HessianFactor, factorize
from ..reconstruct import get_reconstructor
from ..reconstruct.base import LowRankReconstructor, Reconstructor
from ..reconstruct.linalg import weighted_low_rank
from ..reconstruct.loss import weighted_square
from ..reconstruct.serq import Serq
from ..reconstruct.statistics import require, require_fisher, require_flattening
from ..scheme import QuantScheme
from ..types import InputStatistics, Statistic
from .allocate import Option
from .cost import Choice
from .spectra import compensated_error, diagonal_loss, losses_by_channels, losses_by_rank, reweighted, rounding_error

_SAMPLE_ROWS = 256


def input_statistics(config: BuildConfig) -> frozenset[Statistic]:
    """What ``LossModel`` needs of the inputs: besides what the method itself asks for, R."""
    requires = get_reconstructor(config.reconstruct).requires | {Statistic.AUTOCORRELATION}
    return frozenset(statistic for statistic in requires if not statistic.needs_gradients)


@dataclass(frozen=True, slots=True)
class _Input:
    """What the linear layers that share an input have in common.

    importance: (in_features,) float64, what an independent rounding error of a channel costs
    hessian:    of gptq; None: rounding to nearest
    """

    autocorrelation: Tensor
    importance: Tensor
    hessian: HessianFactor | None


class LossModel:
    """Predicts the losses of the linear layers that share an input: what depends on the input is worked out once."""

    def __init__(
        self, config: BuildConfig, statistics: InputStatistics, judging: InputStatistics | None = None
    ) -> None:
        """Work out what depends on the input alone.

        Args:
            config: what would be built.
            statistics: of the shared input, in the coordinates in which weights are quantized: what errors are fitted
                to.
            judging: of the same input in other text, whose autocorrelation tells what errors cost; None: in the same.
        """
        self._config = config
        autocorrelation = statistics.autocorrelation
        assert autocorrelation is not None  # noqa: S101 - input_statistics asks for it
        self._input = _shared(config, autocorrelation)
        judge = autocorrelation if judging is None else judging.autocorrelation
        assert judge is not None  # noqa: S101 - as above
        self._judging = judge

    def options(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        choices: Sequence[Choice],
        unit: float | None,
        energy: Tensor | None = None,
    ) -> list[Option]:
        """The ``choices`` with their losses.

        Args:
            weight: (out_features, in_features) float32, in the coordinates in which it is quantized.
            statistics: of the layer; with ``output_gradient`` the loss is weighted by it.
            choices: what the layer may become.
            unit: what ``tr(D E R E^T)`` is multiplied with; None: divided by ``tr(D W R W^T)`` instead.
            energy: (in_features,), mean squares of the input as gradients weigh them; None: as they are.

        Raises:
            SchemeError: a weight that a scheme cannot hold.
            CalibrationError: a statistic is missing or not finite.
        """
        output_weighting, judging = statistics.output_gradient, self._judging
        if energy is not None:
            judging = reweighted(judging, energy)
        if unit is None:
            total = _weighted_total(weight, judging, output_weighting)
            unit = 1 / total if total > 0 else 0.0
        schemes = {choice.scheme.num_bits: choice.scheme for choice in choices}
        reference = schemes[_reference_width(self._config, list(schemes))]
        ranks = sorted({choice.rank for choice in choices})
        at_rank = dict(zip(ranks, self._losses(weight, statistics, judging, reference, ranks), strict=True))
        ratios = self._ratios(weight, output_weighting, judging, schemes, reference)
        return [
            Option(
                choice.scheme.num_bits,
                choice.rank,
                choice.stored_bits,
                unit * at_rank[choice.rank] * ratios[choice.scheme.num_bits],
            )
            for choice in choices
        ]

    def _losses(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        judging: Tensor,
        scheme: QuantScheme,
        ranks: list[int],
    ) -> list[float]:
        """``tr(D E R E^T)`` of what is left of the error at each of ``ranks``, with ``judging`` for R."""
        output_weighting = statistics.output_gradient
        error = rounding_error(weight, scheme, self._clip_importance())
        if self._input.hessian is not None:
            error = compensated_error(error, self._input.hessian)
        reconstructor = get_reconstructor(self._config.reconstruct)
        if isinstance(reconstructor, Serq):
            order = _saliency(reconstructor, weight, statistics).argsort(descending=True, stable=True)
            ordered = judging[order][:, order]
            return losses_by_channels(error[:, order], ranks, ordered, output_weighting)
        up, down = error.new_empty(len(error), 0), error.new_empty(0, error.shape[1])
        if ranks[-1] > 0:
            weighting, rows = self._norm(reconstructor, statistics, weight)
            up, down = weighted_low_rank(error, weighting, ranks[-1], rows)
        losses = losses_by_rank(error, up, down, judging, output_weighting).tolist()
        return [losses[rank] for rank in ranks]

    def _ratios(
        self,
        weight: Tensor,
        output_weighting: Tensor | None,
        judging: Tensor,
        schemes: dict[int, QuantScheme],
        reference: QuantScheme,
    ) -> dict[int, float]:
        """Loss of each width relative to ``reference``, on a sample of rows."""
        rows = slice(None, None, max(1, len(weight) // _SAMPLE_ROWS))
        weights = None if output_weighting is None else output_weighting[rows]
        diagonal = self._input.autocorrelation.diagonal()
        rescaled = torch.where(diagonal > 0, judging.diagonal() / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
        importance = self._input.importance * rescaled
        losses = {
            num_bits: diagonal_loss(rounding_error(weight[rows], scheme, self._clip_importance()), importance, weights)
            for num_bits, scheme in schemes.items()
        }
        base = losses[reference.num_bits]
        return {num_bits: loss / base if base > 0 else 1.0 for num_bits, loss in losses.items()}

    def _norm(
        self, reconstructor: Reconstructor, statistics: InputStatistics, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the method weighs input and output channels with."""
        if self._config.reconstruct.refit:
            return self._input.autocorrelation, None
        if isinstance(reconstructor, LowRankReconstructor):
            in_features, out_features = weight.shape[1], weight.shape[0]
            weighting = reconstructor.weighting(statistics, in_features)
            return weighting, reconstructor.output_weighting(statistics, out_features)
        if Statistic.FISHER in reconstructor.requires:
            rows, columns = require_fisher(statistics, *weight.shape)
            return columns, rows
        if Statistic.AUTOCORRELATION in reconstructor.requires:
            return self._input.autocorrelation, None
        return None, None

    def _clip_importance(self) -> Tensor | None:
        return self._input.importance if self._config.quantizer.use_clip_search else None


def _shared(config: BuildConfig, autocorrelation: Tensor) -> _Input:
    quantizer = config.quantizer
    if quantizer.method != "gptq":
        return _Input(autocorrelation, autocorrelation.diagonal().clone(), None)
    hessian = factorize(autocorrelation, quantizer.damping, use_act_order=quantizer.use_act_order)
    importance = torch.empty_like(hessian.pivots).index_copy_(0, hessian.order, hessian.pivots)
    return _Input(autocorrelation, importance, hessian)


def _weighted_total(weight: Tensor, autocorrelation: Tensor, output_weighting: Tensor | None) -> float:
    if output_weighting is not None:
        weight = weight * output_weighting.sqrt()[:, None].to(weight.dtype)
    return weighted_square(weight, autocorrelation)


def _reference_width(config: BuildConfig, widths: list[int]) -> int:
    """The width that the decomposition is made at: the one nearest to what the layers will get on average."""
    target = config.scheme.num_bits if config.budget is None else config.budget.target_bits
    return min(widths, key=lambda width: (abs(width - target), width))


def _saliency(method: Serq, weight: Tensor, statistics: InputStatistics) -> Tensor:
    """As ``Serq`` ranks input channels."""
    if method.options.saliency == "scale":
        flattening = require_flattening(statistics, weight.shape[1])
        return require(statistics, Statistic.ABSMAX, weight.shape[1]) if flattening is None else flattening
    return require(statistics, Statistic.MEAN_SQUARE, weight.shape[1]) * weight.double().square().sum(0)
