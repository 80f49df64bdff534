"""Water-filling: one option per layer, so that all together fit a budget of bits and lose as little as possible.

Starts with every layer at its cheapest and keeps spending where a bit removes most: of all moves of one layer to a
costlier option that still fit what is left, the one with the steepest fall of loss per bit. While everything fits this
walks down the lower convex hulls of the layers in the order of their slopes, which is the Lagrangian solution: no other
choice with as few bits loses less. Where the budget ends between two steps of that walk, smaller moves fill what is
left. The result then loses at most what the step that no longer fitted would have removed.

A larger budget never loses more: up to the first move that only the larger one can pay, both do the same; that move
removes more per bit than anything open to the smaller one, and costs more than all that it has left.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CalibrationError, SchemeError


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a layer: what it costs, and what it loses (any unit that adds up over layers).

    num_bits, rank: what it is
    """

    num_bits: int
    rank: int
    stored_bits: float
    loss: float


@dataclass(frozen=True, slots=True)
class _Move:
    """From one option of a layer to a costlier one; ``slope`` is loss removed per bit."""

    slope: float
    cost: float
    index: int


def allocate(options: Mapping[str, Sequence[Option]], budget_bits: float) -> dict[str, Option]:
    """Choose one option per layer.

    Args:
        options: per layer, at least one, in any order.
        budget_bits: stored bits of all layers together.

    Raises:
        SchemeError: not even the cheapest options fit.
        CalibrationError: a loss that is not finite.
    """
    candidates = {layer: _useful(layer, offered) for layer, offered in options.items()}
    chosen = dict.fromkeys(candidates, 0)
    left = budget_bits - math.fsum(offered[0].stored_bits for offered in candidates.values())
    # Sums of the same numbers in another order may differ in their last digits.
    tolerance = 1e-9 * budget_bits
    if left < -tolerance:
        raise SchemeError(
            f"the cheapest options take {budget_bits - left:.0f} bits, the budget is {budget_bits:.0f}: "
            "raise target_bits"
        )
    left += tolerance
    queue: list[tuple[float, float, str, int]] = []

    def offer(layer: str) -> None:
        move = _best_move(candidates[layer], chosen[layer], left)
        if move is not None:
            heapq.heappush(queue, (-move.slope, move.cost, layer, move.index))

    for layer in candidates:
        offer(layer)
    while queue:
        # What is left only shrinks, so a layer's best move only gets worse: an entry is an upper bound, never too low.
        _, cost, layer, index = heapq.heappop(queue)
        if cost <= left:
            chosen[layer] = index
            left -= cost
        offer(layer)
    return {layer: candidates[layer][index] for layer, index in chosen.items()}


def _useful(layer: str, offered: Sequence[Option]) -> list[Option]:
    """Options by rising cost, without those that cost more than another and lose no less."""
    if not offered:
        raise SchemeError(f"{layer}: there is nothing to choose from")
    kept: list[Option] = []
    for option in sorted(offered, key=lambda it: (it.stored_bits, it.loss, it.rank, it.num_bits)):
        if not math.isfinite(option.loss):
            raise CalibrationError(f"{layer}: the predicted loss at {option.num_bits} bits is {option.loss}")
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _best_move(offered: Sequence[Option], current: int, left: float) -> _Move | None:
    """The steepest of the moves that fit; of equally steep ones the cheapest."""
    best: _Move | None = None
    for index in range(current + 1, len(offered)):
        cost = offered[index].stored_bits - offered[current].stored_bits
        if cost > left:
            break
        slope = (offered[current].loss - offered[index].loss) / cost
        if best is None or slope > best.slope:
            best = _Move(slope, cost, index)
    return best
