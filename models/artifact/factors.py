"""Low-rank factors in the artifact: which of its types a correction has, and what its tensors are."""

from dataclasses import dataclass

from ..config import FactorDtype
from ..errors import ArtifactError
from ..quant.factors import FACTOR_SCHEMES, FLOAT_FACTORS
from ..scheme import QuantScheme
from ..types import Correction, Factor, QuantizedWeight


@dataclass(frozen=True, slots=True)
class FactorShape:
    """One factor as it is stored: a matrix of floating-point numbers, or of codes.

    scheme: None for floating-point numbers
    """

    rows: int
    columns: int
    scheme: QuantScheme | None

    def num_stored_bits(self, itemsize: int) -> float:
        """Bits of codes and scales, or of numbers of ``itemsize`` bytes."""
        bits = 8 * itemsize if self.scheme is None else self.scheme.weight_bits(self.columns)
        return bits * self.rows * self.columns


def factor_dtype_of(correction: Correction) -> FactorDtype:
    """How both factors of ``correction`` are stored.

    Raises:
        ArtifactError: they differ, or one is of a type that the format does not store.
    """
    factors = (correction.lora_up, correction.lora_down)
    names = {_type_name(factor) for factor in factors if factor is not None}
    known: tuple[FactorDtype, ...] = (*FLOAT_FACTORS, *FACTOR_SCHEMES)
    found = [name for name in known if name in names]
    if len(found) != 1 or len(names) != 1:
        raise ArtifactError(f"low-rank factors of type {sorted(names)}: give both one of {sorted(known)}")
    return found[0]


def factor_shapes(
    factor_dtype: FactorDtype, rank: int, out_features: int, in_features: int, is_single: bool
) -> dict[str, FactorShape]:
    """Stored shapes by name, ``lora_up`` first; codes of ``lora_up`` are transposed beside a ``lora_down``."""
    scheme = FACTOR_SCHEMES.get(factor_dtype)
    if is_single:
        return {"lora_up": FactorShape(out_features, rank, scheme)}
    up = (out_features, rank) if scheme is None else (rank, out_features)
    return {"lora_up": FactorShape(*up, scheme), "lora_down": FactorShape(rank, in_features, scheme)}


def _type_name(factor: Factor) -> str:
    if isinstance(factor, QuantizedWeight):
        return next((name for name, scheme in FACTOR_SCHEMES.items() if scheme == factor.scheme), str(factor.scheme))
    return str(factor.dtype).removeprefix("torch.")
