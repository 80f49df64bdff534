"""GPTQ: input channels are rounded one after the other, and the later ones make up for the error of the earlier ones.

Minimises the output error ``tr(E H E^T)``, ``E = W - What``, over the codes, greedily. H is the autocorrelation of the
layer's inputs (its scale is irrelevant). With ``H = M D M^T``, M unit upper triangular and D diagonal, the error is

    sum_k D_k |e_k + sum_{j<k} e_j M_jk|^2          hence      what_k = round(w_k + sum_{j<k} e_j M_jk)

where e_k is column k of E. This is GPTQ (arXiv 2210.17323) to the last code: its Cholesky factor of the inverse of H
propagates the same errors (QuIP, arXiv 2307.13304, theorem 6). But there is nothing to invert, which is faster and
loses no digits, and a column gathers earlier errors when it needs them instead of all later ones being updated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..scheme import QuantScheme
from ..types import QuantizedWeight
from .checks import check_weight
from .clip import search_grid
from .grid import choose_grid, decode, encode

_BLOCK_SIZE = 128
_LEAST_DAMPING = 1e-4
_MOST_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """What ``quantize_gptq`` needs of H, made once for all weights that share an input.

    order:          (in_features,) int64, input channels as they are taken
    feedback:       (in_features, in_features) float32, M^T in that order: row k holds what the errors of the columns
        before k add to column k, then 1
    pivots:         (in_features,) float64, D in that order: how much of the square of a channel is left when the
        channels after it have made up for what they can
    importance:     (in_features,) float64, by which grids are searched, in the order of the weight
    is_dead:        (in_features,) bool, channels that are always zero, in the order of the weight
    has_act_order:  ``order`` is that of falling mean square
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
    importance: Tensor
    is_dead: Tensor
    has_act_order: bool


def factorize(autocorrelation: Tensor, damping: float, *, use_act_order: bool) -> HessianFactor:
    """Factor ``autocorrelation`` (in_features, in_features), damped.

    float64, because D spans as many orders of magnitude as H does and float32 has nothing but noise at its small end.

    Args:
        autocorrelation: E[x^T x], finite; may be singular (dead channels, fewer tokens than channels); not changed
        damping: share of the mean diagonal that is added to the diagonal; ten times as much, up to 1, where H turns
            out not to be positive definite
        use_act_order: take channels in the order of falling mean square

    Raises:
        CalibrationError: not positive definite with a damping of 1 either.
    """
    diagonal = autocorrelation.diagonal().double()
    is_dead = diagonal <= 0
    mean_square = torch.where(is_dead, diagonal[~is_dead].mean() if bool((~is_dead).any()) else 1.0, diagonal)
    channels = torch.arange(len(diagonal), device=diagonal.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if use_act_order else channels
    # Cholesky gives a lower factor, of which M is the upper one when everything runs backwards.
    backwards = order.flip(0)

    def hessian() -> Tensor:
        # Column after column, as Cholesky has its result: it is made in the same memory.
        columns = autocorrelation.T[backwards[:, None], backwards].double().T
        columns.diagonal().copy_(mean_square[backwards])
        return columns

    lower = _damped_cholesky(hessian, damping)
    roots = lower.diagonal().clone()
    narrow = lower.div_(roots).float()
    del lower
    feedback = narrow.T.flip(0, 1)
    pivots = roots.square().flip(0)
    # The pivots weigh the rounding of each column exactly, but not what feedback carries off the end of a clipped grid,
    # to which few bits and fixed grids are prone. Their geometric mean with the mean squares is about as good where
    # that does not happen, and much better where it does.
    importance = pivots[torch.argsort(order)].mul_(mean_square).sqrt_().masked_fill_(is_dead, 0)
    return HessianFactor(order, feedback, pivots, importance, is_dead, use_act_order)


def _damped_cholesky(fresh: Callable[[], Tensor], damping: float) -> Tensor:
    """Lower factor of the matrix that ``fresh`` makes, damped until no pivot is left to rounding errors.

    In the memory of that matrix, which is made again where it takes more damping: one matrix instead of two.
    """
    while True:
        lower = fresh()
        size, mean = len(lower), lower.diagonal().mean()
        lower.diagonal().add_(damping * mean)
        diagonal = lower.diagonal().clone()
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        noise = size * torch.finfo(torch.float64).eps
        if int(info) == 0 and bool((lower.diagonal().square() > noise * diagonal).all()):
            return lower
        if damping >= _MOST_DAMPING:
            raise CalibrationError(
                f"gptq: the autocorrelation of the {size} input channels is not positive definite, even with "
                f"{damping:g} times its mean diagonal added: it is damaged, or not a sum of squares. "
                f"Calibrate again, on at least {size} tokens, or choose quantizer rtn"
            )
        del lower
        damping = min(max(10 * damping, _LEAST_DAMPING), _MOST_DAMPING)


def quantize_gptq(
    weight: Tensor,
    scheme: QuantScheme,
    hessian: HessianFactor,
    *,
    use_clip_search: bool = False,
    block_size: int = _BLOCK_SIZE,
) -> QuantizedWeight:
    """Codes of ``weight`` (out_features, in_features), later channels making up for the rounding of earlier ones.

    The grid of a group is chosen when its first column is reached, from its columns as they are by then; with
    act-order, which scatters the columns of a group, all grids come from the weight itself. Dead channels become zero.

    Args:
        weight: finite
        scheme: any format
        hessian: of the layer's inputs
        use_clip_search: choose grids by ``clip.search_grid`` too, and keep them in the rows where the loss is lower
        block_size: columns between two gatherings of earlier errors, where grids are fixed; codes do not depend on it

    Raises:
        SchemeError: a weight that ``scheme`` cannot hold.
        CalibrationError: ``hessian`` is of another number of channels.
    """
    check_weight(weight, scheme)
    if weight.shape[1] != len(hessian.order):
        raise CalibrationError(
            f"gptq: the autocorrelation is of {len(hessian.order)} input channels, the weight has {weight.shape[1]}"
        )
    weight = weight.float().masked_fill(hessian.is_dead, 0)
    spanning = _Rounding(weight, scheme, hessian, None)
    spanning.run(block_size)
    if not use_clip_search:
        return spanning.result(None)
    searched = _Rounding(weight, scheme, hessian, hessian.importance)
    searched.run(block_size)
    return searched.result(spanning)


class _Rounding:
    """One pass over the columns of a weight.

    Matrices are transposed, (in_features, out_features), rows in the order of ``hessian``: a column of the weight is
    then contiguous. Grids are float32 for the same reason, speed; they hold what is stored.

    loss: (out_features,) float64, ``tr(E H E^T)`` of each row of the weight, H damped
    """

    def __init__(self, weight: Tensor, scheme: QuantScheme, hessian: HessianFactor, importance: Tensor | None) -> None:
        self._weight = weight
        self._scheme = scheme
        self._hessian = hessian
        self._importance = importance
        self._group_length = scheme.group_length(weight.shape[1])
        self._has_moving_grids = not hessian.has_act_order and self._group_length < weight.shape[1]
        self._columns = weight.T[hessian.order]
        self._errors = torch.empty_like(self._columns)
        self._codes = torch.empty_like(self._columns, dtype=torch.uint8)
        self._scales: list[Tensor] = []
        self._zero_points: list[Tensor] = []
        self.loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)

    def run(self, block_size: int) -> None:
        """Round all columns."""
        if not self._has_moving_grids:
            self._choose_grids(self._weight, self._importance)
        width = self._group_length if self._has_moving_grids else block_size
        for start in range(0, len(self._columns), width):
            self._round_block(slice(start, start + width))

    def _round_block(self, block: slice) -> None:
        columns, errors = self._columns[block], self._errors[block]
        feedback = self._hessian.feedback[block, block]
        wanted = torch.addmm(columns, self._hessian.feedback[block, : block.start], self._errors[: block.start])
        if self._has_moving_grids:
            # GPTQ's updated weights: the least loss from here on, were these columns free to take any value.
            updates = torch.linalg.solve_triangular(feedback, wanted - columns, upper=False, unitriangular=True)
            importance = None if self._importance is None else self._importance[block]
            self._choose_grids((columns + updates).T, importance)
        for index, group in enumerate((self._hessian.order[block] // self._group_length).tolist()):
            scale, zero_point = self._grid(group)
            value = torch.addmv(wanted[index], errors[:index].T, feedback[index, :index])
            code = encode(value, scale, zero_point, self._scheme)
            self._codes[block.start + index] = code
            torch.sub(columns[index], decode(code, scale, zero_point, self._scheme), out=errors[index])
        residual = torch.addmm(wanted - columns, feedback, errors)
        self.loss += self._hessian.pivots[block] @ residual.double().square_()

    def _choose_grids(self, weight: Tensor, importance: Tensor | None) -> None:
        """Append the grids of all groups of ``weight`` (out_features, columns)."""
        scale, zero_point = (
            choose_grid(weight, self._scheme) if importance is None else search_grid(weight, self._scheme, importance)
        )
        self._scales += scale.T.float().unbind(0)
        self._zero_points += [] if zero_point is None else zero_point.T.float().unbind(0)

    def _grid(self, group: int) -> tuple[Tensor, Tensor | None]:
        return self._scales[group], self._zero_points[group] if self._zero_points else None

    def result(self, other: "_Rounding | None") -> QuantizedWeight:
        """The rows of this pass, but those of ``other`` where its loss is not higher."""
        scale = torch.stack(self._scales, 1).to(torch.bfloat16 if self._scheme.has_exponent_scale else torch.float16)
        zero_point = torch.stack(self._zero_points, 1).to(torch.uint8) if self._zero_points else None
        codes = torch.empty(self._weight.shape, dtype=torch.uint8, device=self._weight.device)
        codes[:, self._hessian.order] = self._codes.T
        if other is None:
            return QuantizedWeight(codes, scale, zero_point, self._scheme)
        rows, kept = other.loss <= self.loss, other.result(None)
        codes[rows], scale[rows] = kept.codes[rows], kept.scale[rows]
        if zero_point is not None and kept.zero_point is not None:
            zero_point[rows] = kept.zero_point[rows]
        return QuantizedWeight(codes, scale, zero_point, self._scheme)
