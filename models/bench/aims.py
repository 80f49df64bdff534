"""What the GPU path is meant to reach, and whether a bench shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .contenders import ours
from .layer_times import LayerTime
from .roofline import RANK, W4A8, W4A16

LARGE_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim.

    wanted: the bound, in words
    value:  what was measured; None: it was not
    is_met: None with no value
    """

    name: str
    wanted: str
    value: float | None
    is_met: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "wanted": self.wanted, "value": self.value, "is_met": self.is_met}


def aims(times: Sequence[LayerTime], decode_share: float | None) -> list[Aim]:
    """All aims; of several shapes the worst one counts.

    Args:
        times: of single layers.
        decode_share: decoding of one sequence by W4 LLaMA-2-7B, as a share of the card's memory limit.
    """
    wide = {
        scheme.name: _worst(
            [it.of_cublas for it in times if it.num_rows == LARGE_BATCH and it.contender == ours(scheme, 0).name], min
        )
        for scheme in (W4A16, W4A8)
    }
    fused = {ours(scheme, RANK).name for scheme in (W4A16, W4A8)}
    extra = _worst([it.rank_share for it in times if it.contender in fused], max)
    return [
        _aim("decoding of W4 LLaMA-2-7B, batch 1, of the memory limit", "at least 85 %", decode_share, 0.85),
        _aim(f"W4A16 at M = {LARGE_BATCH}, of cuBLAS bf16", "at least 80 %", wide[W4A16.name], 0.80),
        _aim(f"W4A8 at M = {LARGE_BATCH}, of cuBLAS bf16", "more than 100 %", wide[W4A8.name], 1.0),
        Aim(
            f"time that a correction of rank {RANK} adds, fused",
            "less than 5 %",
            extra,
            None if extra is None else extra < 0.05,
        ),
    ]


def _aim(name: str, wanted: str, value: float | None, bound: float) -> Aim:
    return Aim(name, wanted, value, None if value is None else value > bound or (value == bound and bound < 1))


def _worst(values: Sequence[float | None], choose: Any) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None
