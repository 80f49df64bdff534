"""Clip search: the grid of each group is the one with the least error, not the one that spans the group.

A few large weights stretch the span, and with it the rounding error of all the others. The search gives them up where
that pays: it minimises ``sum_j d_j (w_j - what_j)**2`` over the group, d_j being the mean square of input channel j,
which is the output error with channels taken as uncorrelated. It offers shrunk grids, keeps the best of each group, and
polishes it by alternating least squares: the codes on the grid, then the grid that fits these codes best.

Every candidate is evaluated as it would be stored (float16 scale, integer zero point), and the grid that spans the
group is the first of them: no group ever comes out worse than rounding to nearest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scheme import QuantScheme
from .affine import span_grid, stored_scale
from .grid import choose_grid, decode, encode, grouped
from .mx import MAX_EXPONENT, MIN_EXPONENT

_SHRINKS = tuple(percent / 100 for percent in range(95, 15, -5))
_SHRINKS_OF_ONE_END = tuple(percent / 100 for percent in range(90, 15, -10))
_EXPONENT_STEPS = (-1, 1, -2)
_NUM_POLISHES = 3
_LARGEST_SCALE = torch.finfo(torch.float16).max
# Few enough for the temporaries of a candidate to stay in the processor's cache.
_VALUES_AT_ONCE = 1 << 17


def search_grid(weight: Tensor, scheme: QuantScheme, mean_square: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group of ``weight`` with the least error weighted by ``mean_square``.

    Args:
        weight: (out_features, in_features), finite
        scheme: any format
        mean_square: (in_features,), finite and not negative; all zero within a group leaves the grid that spans it

    Returns:
        As ``choose_grid``.

    Raises:
        SchemeError: as ``choose_grid``.
    """
    scale, zero_point = choose_grid(weight, scheme)
    importance = grouped(mean_square.double()[None], scheme)[0]
    largest = importance.amax(-1, keepdim=True)
    importance = (importance / torch.where(largest > 0, largest, 1.0)).float()
    rows_at_once = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        groups = grouped(weight[rows].float(), scheme)
        # Slices are views: the better grids that the search finds are written into the result.
        _GroupSearch(groups, scheme, importance, scale[rows], None if zero_point is None else zero_point[rows]).run()
    return scale, zero_point


class _GroupSearch:
    """The best grid so far of every group, which better candidates overwrite.

    groups: (rows, num_groups, group_length) float32
    importance: (num_groups, group_length) float32, at most 1
    scale, zero_point: (rows, num_groups), on entry the grid that spans the group
    """

    def __init__(
        self, groups: Tensor, scheme: QuantScheme, importance: Tensor, scale: Tensor, zero_point: Tensor | None
    ) -> None:
        self._groups = groups
        self._scheme = scheme
        self._importance = importance
        self._root_importance = importance.sqrt()
        self._scale = scale
        self._zero_point = zero_point
        self._loss = self._evaluate(scale, zero_point)

    def run(self) -> None:
        """Leave the best grid in ``scale`` and ``zero_point``."""
        if self._scheme.has_exponent_scale:
            self._search_exponents()
        elif self._zero_point is None:
            self._search_scales()
        else:
            self._search_spans(self._zero_point)

    def _search_exponents(self) -> None:
        candidates = self._scale.float() * self._column([2.0**step for step in _EXPONENT_STEPS])
        self._offer(candidates.clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT).to(self._scale.dtype), None)

    def _search_scales(self) -> None:
        self._offer(self._stored(self._scale.float() * self._column(_SHRINKS)), None)
        for _ in range(_NUM_POLISHES):
            self._offer(self._fitted_scale(self._steps(None)), None)

    def _search_spans(self, zero_point: Tensor) -> None:
        """Shrink both ends together, then the lower, then the upper one; every round starts from the best so far."""
        low, high = self._groups.aminmax(dim=-1)
        low, high = low.clamp(max=0)[None], high.clamp(min=0)[None]
        best_low, best_high = low, high
        for moves_low, moves_high in ((True, True), (True, False), (False, True)):
            shrinks = self._column(_SHRINKS if moves_low and moves_high else _SHRINKS_OF_ONE_END)
            lows = low * shrinks if moves_low else best_low.expand(len(shrinks), -1, -1)
            highs = high * shrinks if moves_high else best_high.expand(len(shrinks), -1, -1)
            best = self._offer(*span_grid(lows, highs, self._shape, self._scheme))
            best_low = torch.cat([best_low, lows]).gather(0, best)
            best_high = torch.cat([best_high, highs]).gather(0, best)
        for _ in range(_NUM_POLISHES):
            self._polish(zero_point)

    def _column(self, factors: Sequence[float]) -> Tensor:
        """(num_candidates, 1, 1)."""
        return torch.tensor(factors, dtype=torch.float32, device=self._groups.device)[:, None, None]

    def _polish(self, zero_point: Tensor) -> None:
        """Fit ``w ~ slope * steps + shift`` to the codes of the best grid, round the zero point, then fit the scale."""
        steps = self._steps(zero_point)
        total = self._importance.sum(-1)
        mean_step = _ratio((steps * self._importance).sum(-1), total)
        mean_value = _ratio((self._groups * self._importance).sum(-1), total)
        centred = (steps - mean_step[..., None]).mul_(self._importance)
        slope = _ratio((centred * self._groups).sum(-1), (centred * steps).sum(-1))
        change = (mean_step - _ratio(mean_value, slope)).round()
        moved = (zero_point + change).clamp(0, self._scheme.max_code)
        steps += (zero_point - moved)[..., None]
        self._offer(self._fitted_scale(steps), moved.to(torch.uint8)[None])

    def _fitted_scale(self, steps: Tensor) -> Tensor:
        """The scale with the least loss for codes that stand for ``steps``: a candidate (1, rows, num_groups)."""
        weighted = steps * self._importance
        fitted = _ratio((weighted * self._groups).sum(-1), (weighted * steps).sum(-1))
        return self._stored(torch.where(fitted > 0, fitted, self._scale.float())[None])

    def _steps(self, zero_point: Tensor | None) -> Tensor:
        """Codes of the best grid as what they stand for in units of the scale."""
        codes = encode(self._groups, self._scale[..., None], _expanded(zero_point), self._scheme)
        return decode(codes, torch.ones_like(self._scale)[..., None], _expanded(zero_point), self._scheme)

    def _offer(self, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """Take the best of the candidates (num_candidates, rows, num_groups) for the groups that it makes better.

        Returns:
            (1, rows, num_groups) int64: which one was taken, counted from 1; 0: none
        """
        zeros = [None] * len(scales) if zero_points is None else list(zero_points)
        losses = torch.stack([self._loss, *(self._evaluate(*grid) for grid in zip(scales, zeros, strict=True))])
        best = losses.argmin(0, keepdim=True)
        self._loss = losses.gather(0, best)[0]
        self._scale.copy_(torch.cat([self._scale[None], scales]).gather(0, best)[0])
        if self._zero_point is not None and zero_points is not None:
            self._zero_point.copy_(torch.cat([self._zero_point[None], zero_points]).gather(0, best)[0])
        return best

    def _evaluate(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Root of the loss of each group, (rows, num_groups)."""
        zero, scale = _expanded(zero_point), scale[..., None]
        codes = encode(self._groups, scale, zero, self._scheme)
        error = decode(codes, scale, zero, self._scheme).sub_(self._groups).mul_(self._root_importance)
        loss: Tensor = torch.linalg.vector_norm(error, dim=-1)
        return loss

    def _stored(self, scale: Tensor) -> Tensor:
        return stored_scale(scale.clamp(max=_LARGEST_SCALE), self._shape, self._scheme)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self._groups.shape[0], self._groups.shape[1] * self._groups.shape[2]


def _expanded(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point[..., None]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))
