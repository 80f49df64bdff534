"""SERQ: the input channels that matter most are quantized twice, and the second term is a single matrix.

Channels are taken in the order of falling saliency; the first ``rank`` of them are salient. Their weights W_s are
quantized on their own, ``R = Q_side(W_s)`` in the factor dtype; what that misses, ``W_s - R``, takes their place in the
weight, and all of it is quantized:

    Y = x_c Q([W_s - R, W_rest])^T + x_c[:, :rank] R^T

The salient weights have two stages of codes, and a quantizer that compensates (GPTQ) passes the small error of the
second on to the other channels. The second term reads channels of x_c as they are: one product, no intermediate
result. There is no SVD. As published: rank 128, group size 128, inputs flattened first, and 4 bits for R with one scale
per output, where ``int4`` has one per 32 channels.
Source: SERQ (arXiv 2603.08185) as its published code has it; the paper states the same with the roles of the two terms
swapped.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import with_config
from torch import Tensor

from ..config import ReconstructConfig
from ..errors import SchemeError
from ..quant.factors import check_single_factor, store_factors
from ..quant.grid import dense_factors
from ..scheme import STRICT
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic
from .base import MethodBase
from .statistics import require, require_flattening


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class SerqOptions:
    """Options of serq.

    saliency: what makes an input channel salient. ``scale``: what flattening divided it by, else its largest magnitude;
        as published. ``output-error``: its expected share of the output error, E[x_j^2] ||W_j||^2, the error of weights
        being proportional to their size where channels of one size share a group; not in the paper
    """

    saliency: Literal["scale", "output-error"] = "scale"


class Serq(MethodBase):
    """Quantizes salient input channels in two stages, the first as a matrix of its own.

    ``reconstruct`` takes the first ``rank`` channels as the salient ones: ``channel_order`` puts them there.
    """

    method: ClassVar[str] = "serq"
    requires: frozenset[Statistic] = frozenset({Statistic.ABSMAX})
    options_type: ClassVar[type[SerqOptions]] = SerqOptions
    options: SerqOptions

    def __init__(self, config: ReconstructConfig) -> None:
        super().__init__(config)
        if self.options.saliency == "output-error":
            self.requires = self.requires | {Statistic.MEAN_SQUARE}

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError when there are not that many channels, or the factor dtype does not tile them."""
        if self.rank > in_features:
            raise SchemeError(
                f"{where}: rank {self.rank}, the number of salient channels of serq, is above its {in_features} input "
                f"channels; choose at most {in_features}"
            )
        if self.rank:
            check_single_factor(self.factor_dtype, self.rank, where)

    def channel_order(self, weight: Tensor, statistics: InputStatistics) -> Tensor | None:
        """The salient channels, then the others, each by falling scale, (in_features,) int32.

        By scale, because channels of one size then share the groups of the codes. None where channels are in that order
        already, or for rank 0.
        """
        if self.rank == 0:
            return None
        order = _scale(statistics, weight.shape[1]).argsort(descending=True, stable=True)
        if self.options.saliency == "output-error":
            mean_square = require(statistics, Statistic.MEAN_SQUARE, weight.shape[1])
            energy = mean_square * weight.double().square().sum(0)
            is_salient = torch.zeros_like(energy, dtype=torch.bool)
            is_salient[energy.argsort(descending=True, stable=True)[: self.rank]] = True
            order = torch.cat([order[is_salient[order]], order[~is_salient[order]]])
        is_in_order = bool((order[1:] > order[:-1]).all())
        return None if is_in_order else order.int()

    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        correction = store_factors(weight[:, : self.rank], None, self.factor_dtype)
        salient, _ = dense_factors(correction)
        rest = weight.clone()
        rest[:, : self.rank] -= salient
        return LinearWeights(quantize(rest), correction)


def _scale(statistics: InputStatistics, in_features: int) -> Tensor:
    """What flattening divided each channel by, or else its largest magnitude, (in_features,)."""
    absmax = require(statistics, Statistic.ABSMAX, in_features)
    flattening = require_flattening(statistics, in_features)
    return absmax if flattening is None else flattening
