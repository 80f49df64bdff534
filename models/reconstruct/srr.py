"""SRR: the rank is split between the weight, before it is quantized, and the error, afterwards.

    D1 = the best rank-p approximation of W,   Q = quantize(W - D1),   D2 = the best of rank r - p of W - D1 - Q,

each in the norm of the outputs, ``tr(M R M^T)``. What D1 takes out no longer has to be quantized; what D2 gets is
the error as it came out. The split is the p with the least

    rho_p(S W) * rho_{r-p}(S N),   S^T S = R,

where rho_p(M) is the share of M's energy that its p leading components leave over, and N, uniform in [-1, 1], stands in
for an error that is not known yet. Singular values of S M are the roots of the eigenvalues of M R M^T: no root of R is
taken. p = 0 is QERA-exact, p = r is the order of SVDQuant (arXiv 2411.05007) and of LQ-LoRA.
Source: SRR, Preserve-then-Quantize (arXiv 2602.02001).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import with_config
from torch import Tensor

from ..errors import SchemeError
from ..quant.factors import store_factors
from ..scheme import STRICT
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic
from .base import MethodBase, residual, stored_product
from .linalg import component_losses, weighted_low_rank
from .loss import weighted_square
from .statistics import require

AUTO_SPLIT = -1
_SEED = 0


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class SrrOptions:
    """Options of srr.

    split:    components that go to the weight, 0 (qera-exact) to the rank (SVDQuant's order); -1: chosen per layer
    is_joint: fit all components to ``W - Q`` once the codes are known, which can only lower the output error; not in
        the paper, which leaves D1 as it was taken out
    """

    split: int = AUTO_SPLIT
    is_joint: bool = False

    def __post_init__(self) -> None:
        if self.split < AUTO_SPLIT:
            raise SchemeError(f"split is {self.split}; choose 0 to the rank, or {AUTO_SPLIT} to have it chosen")


class Srr(MethodBase):
    """Preserves leading components of the weight, quantizes the rest, and corrects the error of that."""

    method: ClassVar[str] = "srr"
    requires: frozenset[Statistic] = frozenset({Statistic.AUTOCORRELATION})
    options_type: ClassVar[type[SrrOptions]] = SrrOptions
    options: SrrOptions

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError when rank, factor dtype or split do not suit the weight of layer ``where``."""
        super().check(out_features, in_features, where)
        if self.rank and self.options.split > self.rank:
            raise SchemeError(
                f"{where}: option split of method srr is {self.options.split}, above its rank {self.rank}; choose at "
                f"most that, or {AUTO_SPLIT} to have it chosen"
            )

    def _correct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        weighting = require(statistics, Statistic.AUTOCORRELATION, weight.shape[1])
        # Factors as stored: the codes make up for the rounding of D1, and D2 for what they miss.
        lora_up, lora_down = self._preserve(weight, weighting)
        product = torch.zeros_like(weight)
        if lora_up.shape[1]:
            product = stored_product(store_factors(lora_up, lora_down, self.factor_dtype), weight.dtype)
        quantized = quantize(weight - product)
        error = residual(weight, quantized)
        if self.options.is_joint:
            lora_up, lora_down = weighted_low_rank(error, weighting, self.rank)
            return LinearWeights(quantized, store_factors(lora_up, lora_down, self.factor_dtype, error, weighting))
        num_left = self.rank - lora_up.shape[1]
        if num_left:
            correcting = weighted_low_rank(error - product, weighting, num_left)
            lora_up, lora_down = torch.cat([lora_up, correcting[0]], 1), torch.cat([lora_down, correcting[1]])
        return LinearWeights(quantized, store_factors(lora_up, lora_down, self.factor_dtype))

    def _preserve(self, weight: Tensor, weighting: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the part that is not quantized: leading components of the best approximation of the weight."""
        split = self.options.split
        if split == 0:
            return weight.new_empty(weight.shape[0], 0), weight.new_empty(0, weight.shape[1])
        lora_up, lora_down = weighted_low_rank(weight, weighting, self.rank if split == AUTO_SPLIT else split)
        if split == AUTO_SPLIT:
            split = choose_split(weight, lora_down, weighting)
        return lora_up[:, :split], lora_down[:split]


def choose_split(weight: Tensor, lora_down: Tensor, weighting: Tensor) -> int:
    """Components to preserve, 0 to rank, with the least expected loss; the fewest of equally good ones.

    Args:
        weight: (out_features, in_features)
        lora_down: (rank, in_features), of the best approximation of ``weight``
        weighting: (in_features, in_features)
    """
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1).to(weight.device)
    _, noise_down = weighted_low_rank(noise, weighting, lora_down.shape[0])
    of_weight = _shares_left(weight, lora_down, weighting)
    of_noise = _shares_left(noise, noise_down, weighting)
    losses = (of_weight * of_noise.flip(0)).tolist()
    return losses.index(min(losses))


def _shares_left(matrix: Tensor, lora_down: Tensor, weighting: Tensor) -> Tensor:
    """Share of ``tr(M R M^T)`` left over by the 0, 1, ..., rank leading components, (rank + 1,)."""
    removed = torch.nn.functional.pad(component_losses(lora_down, weighting).cumsum(0), (1, 0))
    total = weighted_square(matrix, weighting)
    return (1 - removed / total).clamp(min=0) if total > 0 else torch.zeros_like(removed)
