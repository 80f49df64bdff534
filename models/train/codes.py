"""Trainable parameters behind the codes of one weight: one class per form that low-rank parameters take.

Forward gives the merged codes exactly, by the very functions of ``reconstruct.merge`` that the merge itself calls, with
the gradient of the product of the factors before any rounding.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

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
from ..types import QuantizedWeight
from .straight import straight, straight_round


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
        fraction = None if self._fraction is None else self._fraction.to(torch.int32)
        return IntegerBase(self._codes.to(torch.int32), fraction, self._fraction_bits, self._max_code)

    @abstractmethod
    def values(self) -> Tensor:
        """V, the merged integers before the clamp, int32; no gradient."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, Penalties]:
        """Clamped codes (out_features, in_features) float32 with gradients, and what the merge loses."""

    @torch.no_grad()
    def merged(self) -> Tensor:
        """What ships: uint8 codes (out_features, in_features)."""
        return clamp_codes(self.values(), self.base)

    def _clamped(self, moved: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes within the grid, gradient inside it only, and the overflow beyond it; ``moved`` stands in for V."""
        exact = straight(moved, values)
        codes = exact.clamp(0, self._max_code)
        return codes, exact - codes


class FixedCodes(TrainableCodes):
    """Nothing to train: the control."""

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> Self:
        """The codes of ``quantized``, a byte each."""
        return cls(IntegerBase(quantized.codes, None, 0, quantized.scheme.max_code))

    def values(self) -> Tensor:
        """The base's codes."""
        return self.base.codes

    def forward(self) -> tuple[Tensor, Penalties]:
        """The base's codes; nothing is lost."""
        return self._codes.float(), Penalties()


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

    def integers(self) -> tuple[Tensor, Tensor]:
        """A and B, integers in float32, with straight-through gradients inside ``-Q .. Q``."""
        bounded = (latent.clamp(-self._largest, self._largest) for latent in (self.lora_up, self.lora_down))
        up, down = (straight_round(latent) for latent in bounded)
        return up, down

    @torch.no_grad()
    def values(self) -> Tensor:
        """V by the integer merge."""
        return self._merge(exact_product(*self.integers()))

    def _merge(self, product: Tensor) -> Tensor:
        base = self.base
        if self._options.merge == "ternary":
            return ternary_merge(base, product, self._threshold)
        if self._options.merge == "fixed-point":
            merged = fixed_point_merge(base, product, int(self.shift.amin()))
            return torch.where(self.shift < SWITCHED_OFF, merged, base.codes)
        return shift_merge(base, product, self.shift)

    @property
    def _threshold(self) -> float:
        return self._options.threshold * self.lora_up.shape[1]

    def _slope(self) -> Tensor | float:
        """Levels per step of the product."""
        if self._options.merge == "ternary":
            return 1 / self._threshold
        return torch.where(self.shift < SWITCHED_OFF, torch.exp2(-self.shift.float()), 0.0)

    def forward(self) -> tuple[Tensor, Penalties]:
        """As ``TrainableCodes.forward``."""
        up, down = self.integers()
        # bfloat16 products under autocast would not be exact.
        with torch.autocast(up.device.type, enabled=False):
            product = up @ down
        slope = self._slope()
        codes, overflow = self._clamped(product * slope, self._merge(product.detach().to(torch.int32)))
        with torch.autocast(up.device.type, enabled=False):
            unrounded = self.lora_up @ self.lora_down
        # The integers hold still: a penalty that moved them with the latents would draw these nowhere.
        return codes, Penalties((product.detach() - unrounded) * slope, overflow)


class InsideRounding(TrainableCodes):
    """Float factors inside the rounding of a fixed-point base (LR-QAT): ``V = floor(position + A B / rank + 1/2)``."""

    def __init__(self, base: IntegerBase, lora_up: Tensor, lora_down: Tensor) -> None:
        super().__init__(base)
        self.lora_up = nn.Parameter(lora_up.float())
        self.lora_down = nn.Parameter(lora_down.float())

    def _position(self) -> Tensor:
        base, fraction = self.base, self._fraction
        assert fraction is not None  # noqa: S101 - made with one
        with torch.autocast(self.lora_up.device.type, enabled=False):
            product = self.lora_up @ self.lora_down
        return base.codes + fraction * 2.0**-base.fraction_bits + product / self.lora_up.shape[1]

    @torch.no_grad()
    def values(self) -> Tensor:
        """V of the factors as they are."""
        return self._rounded(self._position())

    @staticmethod
    def _rounded(position: Tensor) -> Tensor:
        return torch.floor(position + 0.5).to(torch.int32)

    def forward(self) -> tuple[Tensor, Penalties]:
        """As ``TrainableCodes.forward``; float factors lose nothing by themselves."""
        position = self._position()
        codes, overflow = self._clamped(position, self._rounded(position.detach()))
        return codes, Penalties(None, overflow)
