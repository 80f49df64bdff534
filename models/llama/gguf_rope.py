"""LLaMA 3's rope scaling, recovered from the frequency factors that a GGUF file stores in its place.

The factors are ``1 / ((1 - s) / factor + s)`` with ``s = (original * f / 2 pi - low) / (high - low)``, clamped to 0..1,
for the frequencies f. Multiplying original, low and high by one number changes nothing, so ``low`` can be taken as 1,
which is also what every LLaMA 3 has.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .rope import llama3_factors
from .rope_config import RopeConfig

KNOWN_HIGH = 4.0
KNOWN_ORIGINAL = 8192
RELATIVE_TOLERANCE = 1e-5


def recover_llama3_scaling(factors: Tensor, theta: float, head_dim: int, where: str) -> dict[str, Any] | None:
    """The ``rope_scaling`` that produces ``factors``; None when they scale nothing.

    Args:
        factors: (head_dim / 2,) float64, what each frequency is divided by.
        theta: base of the frequencies.
        head_dim: channels of a head.
        where: names the file in messages.

    Raises:
        CheckpointError: no llama3 scaling produces them.
    """
    if factors.shape != (head_dim // 2,) or not torch.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(f"{where}: rope_freqs.weight does not hold {head_dim // 2} positive factors")
    if torch.equal(factors, torch.ones_like(factors)):
        return None
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor = _tidy(factors.max().item())
    for high, original in _candidates(factors, frequencies, factor):
        rope = RopeConfig("llama3", theta, factor, 1.0, high, original)
        if torch.allclose(llama3_factors(rope, frequencies), factors, rtol=RELATIVE_TOLERANCE, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{where}: the factors in rope_freqs.weight are not those of llama3 scaling; none other is known"
    )


def _candidates(factors: Tensor, frequencies: Tensor, factor: float) -> Iterator[tuple[float, int]]:
    """(high_freq_factor, original_max_position_embeddings): LLaMA 3's own, then a fit to the blended frequencies."""
    yield KNOWN_HIGH, KNOWN_ORIGINAL
    is_blended = (factors > 1.0 + RELATIVE_TOLERANCE) & (factors < factor * (1.0 - RELATIVE_TOLERANCE))
    if int(is_blended.sum()) >= 2:
        blend = (1.0 / factors[is_blended] - 1.0 / factor) / (1.0 - 1.0 / factor)
        # blend = slope * frequency + intercept, with intercept = -low / (high - low)
        columns = torch.stack((frequencies[is_blended], torch.ones_like(blend)), dim=1)
        slope, intercept = torch.linalg.lstsq(columns, blend[:, None]).solution.flatten().tolist()
        if slope > 0 and intercept < 0:
            yield _tidy(1.0 - 1.0 / intercept), round(-slope / intercept * 2 * math.pi)


def _tidy(value: float) -> float:
    """Drop the digits that float32 storage made up."""
    return float(f"{value:.5g}")
