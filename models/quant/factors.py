"""Low-rank factors as they are stored: cast, or quantized with the grids of the weights.

    int8                   symmetric, one scale per component (LQER and QERA keep theirs in 8 bits too)
    int4                   symmetric, groups of 32
    mxint8, mxint6, mxint4 blocks of 32 under ``floor(log2(absmax))``

Quantizing ``lora_down`` changes the space that the correction reads, so what was the best ``lora_up`` no longer is:
``refit_up`` finds the best one for the ``lora_down`` that is really stored (as CALDERA, arXiv 2405.18886, does).

Components are brought to equal size first: ``lora_up[:, j] * c`` and ``lora_down[j] / c`` with c a power of two. Their
product stays the same to the last bit, and neither factor leaves the range of float16, in which factors or their
scales are stored.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import FactorDtype
from ..errors import SchemeError
from ..scheme import PER_CHANNEL, QuantScheme
from ..types import Correction, Factor
from .grid import dense_factors
from .rtn import quantize_rtn
from .weighting import weigh

FLOAT_FACTORS: Mapping[FactorDtype, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)
FACTOR_SCHEMES: Mapping[FactorDtype, QuantScheme] = MappingProxyType(
    {
        "int8": QuantScheme(8, PER_CHANNEL, is_symmetric=True),
        "int4": QuantScheme(4, 32, is_symmetric=True),
        "mxint8": QuantScheme(8, 32, format="mxint"),
        "mxint6": QuantScheme(6, 32, format="mxint"),
        "mxint4": QuantScheme(4, 32, format="mxint"),
    }
)


def check_factors(factor_dtype: FactorDtype, out_features: int, in_features: int, where: str) -> None:
    """Check that groups of ``factor_dtype`` tile both factors of a layer's correction.

    Raises:
        SchemeError: they do not; names the layer ``where``.
    """
    for length, side in ((out_features, "output"), (in_features, "input")):
        _check_groups(factor_dtype, length, f"{side} channels", where)


def check_single_factor(factor_dtype: FactorDtype, rank: int, where: str) -> None:
    """As ``check_factors``, for a ``lora_up`` (out_features, rank) on its own: groups lie along the rank.

    Raises:
        SchemeError: they do not; names the layer ``where``.
    """
    _check_groups(factor_dtype, rank, "channels of its single factor", where)


def store_factors(
    lora_up: Tensor,
    lora_down: Tensor | None,
    factor_dtype: FactorDtype,
    error: Tensor | None = None,
    weighting: Tensor | None = None,
) -> Correction:
    """The correction ``lora_up @ lora_down`` with both factors as ``factor_dtype`` stores them.

    Args:
        lora_up: (out_features, rank)
        lora_down: (rank, in_features), or None: the correction reads the first ``rank`` channels
        factor_dtype: how they are stored
        error: (out_features, in_features), what the correction approximates; given, ``lora_up`` is refitted to the
            stored ``lora_down``. None: ``lora_up`` is stored as it is
        weighting: R of the norm ``tr(A R A^T)`` in which to refit: None for the identity, (in_features,) for a
            diagonal, or (in_features, in_features)

    Raises:
        SchemeError: groups that do not tile a factor, or values that are not finite or beyond the format.
    """
    if lora_down is not None:
        lora_up, lora_down = _equal_sizes(lora_up, lora_down)
    stored_down = None if lora_down is None else _stored(lora_down, factor_dtype, "lora_down")
    if error is not None and lora_up.shape[1]:
        _, reading = dense_factors(Correction(lora_up, stored_down))
        lora_up = refit_up(error, reading, lora_up.shape[1], weighting)
    is_transposed = stored_down is not None and factor_dtype in FACTOR_SCHEMES and lora_up.shape[1] > 0
    return Correction(_stored(lora_up.T if is_transposed else lora_up, factor_dtype, "lora_up"), stored_down)


def refit_up(error: Tensor, lora_down: Tensor | None, rank: int, weighting: Tensor | None) -> Tensor:
    """The ``lora_up`` (out_features, rank) float64 that corrects ``error`` best beside ``lora_down``.

    Minimises ``tr(A R A^T)`` for ``A = error - lora_up @ lora_down`` by its normal equations,
    ``lora_up = E R d^T (d R d^T)^+``. Components that R does not see come out as zero.

    Args:
        error: (out_features, in_features)
        lora_down: (rank, in_features), or None: the first ``rank`` channels
        rank: number of components
        weighting: as in ``store_factors``
    """
    error = error.double()
    if lora_down is None:
        down = torch.eye(rank, error.shape[1], dtype=torch.float64, device=error.device)
    else:
        down = lora_down.double()
    weighted = weigh(down, None if weighting is None else weighting.double())
    gram = weighted @ down.T
    # Components differ in size by orders of magnitude; what the pseudo-inverse cuts off must not depend on it.
    sizes = gram.diagonal().clamp(min=0).sqrt()
    inverse_sizes = torch.where(sizes > 0, 1 / sizes, 0.0)
    correlation = inverse_sizes[:, None] * gram * inverse_sizes
    inverse = torch.linalg.pinv((correlation + correlation.T) / 2, hermitian=True)
    lora_up: Tensor = (error @ weighted.T) @ (inverse_sizes[:, None] * inverse * inverse_sizes)
    return lora_up


def _check_groups(factor_dtype: FactorDtype, length: int, what: str, where: str) -> None:
    scheme = FACTOR_SCHEMES.get(factor_dtype)
    if scheme is not None and length % scheme.group_length(length):
        raise SchemeError(
            f"{where}: factor_dtype {factor_dtype} has groups of {scheme.group_size}, which do not divide {length} "
            f"{what}; choose int8 or bfloat16"
        )


def _stored(factor: Tensor, factor_dtype: FactorDtype, name: str) -> Factor:
    if factor_dtype in FLOAT_FACTORS or 0 in factor.shape:
        stored = factor.to(FLOAT_FACTORS.get(factor_dtype, torch.bfloat16)).contiguous()
        if not bool(stored.isfinite().all()):
            raise SchemeError(
                f"{name} of shape {tuple(factor.shape)} has values that are not finite in {factor_dtype}: "
                "choose factor_dtype bfloat16, and look for inf or nan in the statistics"
            )
        return stored
    try:
        return quantize_rtn(factor, FACTOR_SCHEMES[factor_dtype])
    except SchemeError as problem:
        raise SchemeError(f"{name} cannot be stored as {factor_dtype}: {problem}") from problem


def _equal_sizes(lora_up: Tensor, lora_down: Tensor) -> tuple[Tensor, Tensor]:
    """The same components with both parts about equally large, by a power of two each."""
    if lora_up.shape[1] == 0:
        return lora_up, lora_down
    up, down = lora_up.double(), lora_down.double()
    sizes = down.abs().amax(1) / up.abs().amax(0)
    is_usable = sizes.isfinite() & (sizes > 0)
    factor = torch.where(is_usable, sizes, 1.0).log2().div(2).round().exp2()
    return up * factor, down / factor[:, None]
