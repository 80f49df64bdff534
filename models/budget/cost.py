"""What a layer's bits and rank cost, and which of them a budget may choose from; needs shapes only."""

from dataclasses import dataclass, replace

from ..config import BudgetConfig, BuildConfig, FactorDtype, LayerConfig
from ..errors import SchemeError
from ..llama.config import LinearShape, LlamaConfig
from ..quant.factors import FACTOR_SCHEMES, FLOAT_FACTORS
from ..reconstruct import get_reconstructor
from ..reconstruct.none import NoReconstruction
from ..reconstruct.qer import Qer
from ..reconstruct.serq import Serq
from ..scheme import QuantScheme

_FIXED_WIDTH_FORMATS = frozenset({"mxfp4", "nf4"})
_FINE_RANKS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a layer.

    stored_bits: of the whole layer: codes, scales, zero points and factors
    """

    scheme: QuantScheme
    rank: int
    stored_bits: float


def stored_bits(
    scheme: QuantScheme, shape: LinearShape, rank: int, factor_dtype: FactorDtype, *, has_single_factor: bool = False
) -> float:
    """Stored bits of a layer of this shape: ``LinearWeights.effective_bits`` times its weights.

    Args:
        scheme: number format of the weight.
        shape: of the layer.
        rank: of the correction; 0: none.
        factor_dtype: of its factors.
        has_single_factor: there is no ``lora_down`` (SERQ).
    """
    weight = scheme.weight_bits(shape.in_features) * shape.out_features * shape.in_features
    if rank == 0:
        return weight
    lengths = (shape.out_features,) if has_single_factor else (shape.out_features, shape.in_features)
    if factor_dtype in FLOAT_FACTORS:
        return weight + 8 * FLOAT_FACTORS[factor_dtype].itemsize * rank * sum(lengths)
    factor = FACTOR_SCHEMES[factor_dtype]
    if has_single_factor:  # as it is: its scales run along the rank
        return weight + factor.weight_bits(rank) * rank * shape.out_features
    return weight + sum(factor.weight_bits(length) * rank * length for length in lengths)


def layer_choices(config: BuildConfig, path: str, shape: LinearShape) -> list[Choice]:
    """What the layer ``path`` may become under ``config.budget``, or its one choice without a budget.

    Widths and ranks that the layer's own exceptions fix stay as they are; ranks that the method cannot take in a layer
    of this shape are left out.

    Raises:
        SchemeError: the number format has none of the widths.
    """
    own = config.layers.get(path, LayerConfig())
    scheme = config.scheme if own.group_size is None else replace(config.scheme, group_size=own.group_size)
    budget = config.budget
    has_single_factor = isinstance(get_reconstructor(config.reconstruct), Serq)
    widths = _fixed(own.num_bits, scheme.num_bits) if budget is None else _widths(budget, own, scheme)
    ranks = _fixed(own.rank, config.reconstruct.rank) if budget is None else _ranks(config, budget, own, path, shape)
    if isinstance(get_reconstructor(config.reconstruct), NoReconstruction | Qer):
        ranks = [0]
    choices = []
    for width in widths:
        chosen = replace(scheme, num_bits=width)
        for rank in ranks:
            factor_dtype = config.reconstruct.factor_dtype
            bits = stored_bits(chosen, shape, rank, factor_dtype, has_single_factor=has_single_factor)
            choices.append(Choice(chosen, rank, bits))
    return choices


def network_choices(config: BuildConfig, network: LlamaConfig) -> dict[str, list[Choice]]:
    """``layer_choices`` of every linear layer by module path; layers of one kind share a list.

    Raises:
        SchemeError: as ``layer_choices``.
    """
    known: dict[tuple[LinearShape, LayerConfig | None], list[Choice]] = {}
    choices = {}
    for path, shape in network.linear_shapes().items():
        kind = (shape, config.layers.get(path))
        if kind not in known:
            known[kind] = layer_choices(config, path, shape)
        choices[path] = known[kind]
    return choices


def check_budget(config: BuildConfig, network: LlamaConfig) -> None:
    """Check that ``config.budget`` can be met by ``network``; from shapes alone, in milliseconds.

    Raises:
        SchemeError: the number format has none of the widths, or the target is below the smallest or above the largest
            number of effective bits that the choices reach.
    """
    budget = config.budget
    if budget is None:
        return
    shapes = network.linear_shapes()
    sizes = {path: [it.stored_bits for it in offered] for path, offered in network_choices(config, network).items()}
    num_weights = sum(shape.out_features * shape.in_features for shape in shapes.values())
    least = sum(min(bits) for bits in sizes.values()) / num_weights
    most = sum(max(bits) for bits in sizes.values()) / num_weights
    if least <= budget.target_bits <= most:
        return
    if budget.target_bits < least:
        fix = "choose more, offer narrower widths, take larger groups, or release layers with bits of their own"
    else:
        fix = "choose less, offer wider widths, or raise max_rank"
    raise SchemeError(
        f"target_bits {budget.target_bits:g} is out of reach: widths {list(budget.num_bits)} and ranks up to "
        f"{budget.max_rank} on {config.scheme} take {least:.3f} to {most:.3f} bits per weight; {fix}"
    )


def _fixed(own: int | None, common: int) -> list[int]:
    return [common if own is None else own]


def _widths(budget: BudgetConfig, own: LayerConfig, scheme: QuantScheme) -> list[int]:
    if own.num_bits is not None:
        return [own.num_bits]
    if scheme.format not in _FIXED_WIDTH_FORMATS:
        return sorted(set(budget.num_bits))
    if scheme.num_bits not in budget.num_bits:
        raise SchemeError(
            f"budget num_bits are {list(budget.num_bits)}, but {scheme.format} has {scheme.num_bits} bits: offer that "
            "width, or choose format int or mxint"
        )
    return [scheme.num_bits]


def _ranks(config: BuildConfig, budget: BudgetConfig, own: LayerConfig, path: str, shape: LinearShape) -> list[int]:
    """Fine steps where a component still removes much, coarse ones beyond; those that the method can take."""
    if own.rank is not None:
        return [own.rank]
    candidates = {*range(4, min(_FINE_RANKS, budget.max_rank) + 1, 4), *range(8, budget.max_rank + 1, 8)}
    if budget.max_rank:
        candidates.add(budget.max_rank)
    return [0, *(rank for rank in sorted(candidates) if _is_possible(config, rank, path, shape))]


def _is_possible(config: BuildConfig, rank: int, path: str, shape: LinearShape) -> bool:
    try:
        reconstructor = get_reconstructor(replace(config.reconstruct, rank=rank))
        reconstructor.check(shape.out_features, shape.in_features, path)
    except SchemeError:
        return False
    return True
