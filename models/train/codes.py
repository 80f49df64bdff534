"""Trainable parameters behind the codes of one weight: one class per form that low-rank parameters take.

Forward gives the merged codes exactly, by the very functions of ``reconstruct.merge`` that the merge itself calls, with
the gradient of the product of the factors before any rounding.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reconstruct.merge import (
    SWITCHED_OFF,
    IntegerBase,
    clamp_codes,
    exact_product,
    fixed_point_merge,
    shift_merge,
    ternary_merge,
)
from ..reconstruct.qer import QerOptions
from .straight import straight, straight_round


def values_at_once(device: torch.device) -> int:
    """Weights that are merged at a time: on a CPU so few that the temporaries stay in its cache.

    On other devices, where every operation costs a launch, only so few that the temporaries stay small.
    """
    return 1 << 17 if device.type == "cpu" else 1 << 22


def row_slices(values: Tensor) -> list[slice]:
    """Rows of ``values`` (num_rows, ...) that are formed at a time."""
    step = max(1, values_at_once(values.device) // max(1, values[0].numel()))
    return [slice(start, start + step) for start in range(0, len(values), step)]


@dataclass(frozen=True, slots=True)
class Penalties:
    """What a merge loses, in levels of the grid, (out_features, in_features), with gradients; None: nothing.

    rounding: of the parameters themselves: the product of the factors less that of the unrounded ones, whose gradient
        draws latents to the integers that they are rounded to
    overflow: what the clamp cuts off
    """

    rounding: Tensor | None = None
    overflow: Tensor | None = None


class TrainableCodes(nn.Module, ABC):
    """What the codes of one weight are made of; ``base.codes`` is what they start as.

    Holds no parameter of its own: ``factors`` names those that the factors' learning rate applies to.
    """

    def __init__(self, base: IntegerBase) -> None:
        super().__init__()
        # A byte each: they are the largest part of what a layer in training holds.
        self.register_buffer("_codes", base.codes.to(torch.uint8), persistent=False)
        fraction = None if base.fraction is None else base.fraction.to(torch.int8)
        self.register_buffer("_fraction", fraction, persistent=False)
        self._codes: Tensor
        self._fraction: Tensor | None
        self._fraction_bits, self._max_code = base.fraction_bits, base.max_code

    @property
    def base(self) -> IntegerBase:
        """What the factors are merged into, where the module is."""
        return self._rows_of_base(slice(None))

    def _rows_of_base(self, rows: slice) -> IntegerBase:
        fraction = None if self._fraction is None else self._fraction[rows].to(torch.int32)
        return IntegerBase(self._codes[rows].to(torch.int32), fraction, self._fraction_bits, self._max_code)

    @property
    def row_slices(self) -> list[slice]:
        """Output channels that are merged at a time.

        The same for the training as for the merge, since a product of floats depends on how it is cut.
        """
        return row_slices(self._codes)

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """What is multiplied: (out_features, rank) and (rank, in_features), with gradients."""

    @abstractmethod
    def _values(self, rows: slice, up: Tensor, down: Tensor) -> Tensor:
        """V of ``rows``, int32; no gradient."""

    @abstractmethod
    def part(self, rows: slice, up: Tensor, down: Tensor) -> tuple[Tensor, Penalties]:
        """Clamped codes of ``rows`` float32 with gradients, and what the merge loses; ``up, down = factors()``."""

    @torch.no_grad()
    def values(self) -> Tensor:
        """V, the merged integers before the clamp, int32; no gradient."""
        factors = self.factors()
        return torch.cat([self._values(rows, *factors) for rows in self.row_slices])

    @torch.no_grad()
    def merged(self) -> Tensor:
        """What ships: uint8 codes (out_features, in_features)."""
        return clamp_codes(self.values(), self.base)

    def _clamped(self, moved: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes within the grid, gradient inside it only, and the overflow beyond it; ``moved`` stands in for V."""
        exact = straight(moved, values)
        codes = exact.clamp(0, self._max_code)
        return codes, exact - codes


class IntegerFactors(TrainableCodes):
    """Integer factors: the latents are float, in integer units, and rounded on every use.

    lora_up:   (out_features, rank) float32 latents of A
    lora_down: (rank, in_features) float32 latents of B
    shift:     (out_features, 1) int32, t of each output channel; ``fixed-point`` has one for all but those switched off
    largest:   Q
    """

    def __init__(
        self, base: IntegerBase, options: QerOptions, lora_up: Tensor, lora_down: Tensor, *, shift: Tensor, largest: int
    ) -> None:
        super().__init__(base)
        self._options = options
        self._largest = float(largest)
        self.lora_up = nn.Parameter(lora_up.float())
        self.lora_down = nn.Parameter(lora_down.float())
        self.register_buffer("shift", shift.to(torch.int32))
        self.shift: Tensor
        self._common_shift = int(shift.min())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, integers in float32, with straight-through gradients inside ``-Q .. Q``."""
        bounded = (latent.clamp(-self._largest, self._largest) for latent in (self.lora_up, self.lora_down))
        up, down = (straight_round(latent) for latent in bounded)
        return up, down

    def _values(self, rows: slice, up: Tensor, down: Tensor) -> Tensor:
        return self._merge(rows, exact_product(up[rows], down))

    def _merge(self, rows: slice, product: Tensor) -> Tensor:
        base, shift = self._rows_of_base(rows), self.shift[rows]
        if self._options.merge == "ternary":
            return ternary_merge(base, product, self._threshold)
        if self._options.merge != "fixed-point":
            return shift_merge(base, product, shift)
        is_on = shift < SWITCHED_OFF
        merged = fixed_point_merge(base, product, self._common_shift)
        return merged if bool(is_on.all()) else torch.where(is_on, merged, base.codes)

    @property
    def _threshold(self) -> float:
        return self._options.threshold * self.lora_up.shape[1]

    def _slope(self, rows: slice) -> Tensor | float:
        """Levels per step of the product."""
        if self._options.merge == "ternary":
            return 1 / self._threshold
        shift = self.shift[rows]
        return torch.where(shift < SWITCHED_OFF, torch.exp2(-shift.float()), 0.0)

    def part(self, rows: slice, up: Tensor, down: Tensor) -> tuple[Tensor, Penalties]:
        """As ``TrainableCodes.part``."""
        # bfloat16 products under autocast would not be exact.
        with torch.autocast(up.device.type, enabled=False):
            product = up[rows] @ down
            unrounded = self.lora_up[rows] @ self.lora_down
        slope = self._slope(rows)
        codes, overflow = self._clamped(product * slope, self._merge(rows, product.detach().to(torch.int32)))
        # The integers hold still: a penalty that moved them with the latents would draw these nowhere.
        return codes, Penalties((product.detach() - unrounded) * slope, overflow)


class InsideRounding(TrainableCodes):
    """Float factors inside the rounding of a fixed-point base (LR-QAT): ``V = floor(position + A B / rank + 1/2)``."""

    def __init__(self, base: IntegerBase, lora_up: Tensor, lora_down: Tensor) -> None:
        super().__init__(base)
        self.lora_up = nn.Parameter(lora_up.float())
        self.lora_down = nn.Parameter(lora_down.float())

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors as they are."""
        return self.lora_up, self.lora_down

    def _position(self, rows: slice, up: Tensor, down: Tensor) -> Tensor:
        assert self._fraction is not None  # noqa: S101 - made with one
        with torch.autocast(up.device.type, enabled=False):
            product = up[rows] @ down
        return self._codes[rows] + self._fraction[rows] * 2.0**-self._fraction_bits + product / up.shape[1]

    def _values(self, rows: slice, up: Tensor, down: Tensor) -> Tensor:
        return _nearest(self._position(rows, up, down))

    def part(self, rows: slice, up: Tensor, down: Tensor) -> tuple[Tensor, Penalties]:
        """As ``TrainableCodes.part``; float factors lose nothing by themselves."""
        position = self._position(rows, up, down)
        codes, overflow = self._clamped(position, _nearest(position.detach()))
        return codes, Penalties(None, overflow)


def _nearest(position: Tensor) -> Tensor:
    """To the nearest integers, halves upwards."""
    return torch.floor(position + 0.5).to(torch.int32)
