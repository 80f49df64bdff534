"""Statistics as the methods take them: present, of the right shape, finite, and of the sign they must have."""

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..types import MATRIX_STATISTICS, InputStatistics, Statistic

_ROWS_AT_ONCE = 1024


def require(statistics: InputStatistics, statistic: Statistic, num_features: int) -> Tensor:
    """The named statistic in float64, checked; ``FISHER`` has a function of its own.

    Args:
        statistics: of the layer
        statistic: which of them
        num_features: the layer's input channels, for ``OUTPUT_GRADIENT`` its output channels

    Raises:
        CalibrationError: it is missing, has the wrong shape, is not finite or negative where it cannot be, or is an
            autocorrelation that is not symmetric.
    """
    shape = (num_features,) * (2 if statistic in MATRIX_STATISTICS else 1)
    values: Tensor | None = getattr(statistics, statistic.value)
    if statistic is Statistic.CROSS_CORRELATION:
        return _checked(statistic, values, shape)
    values = _non_negative(statistic, values, shape)
    if values.dim() == 2:
        _check_symmetric(statistic, values)
    return values


def require_fisher(statistics: InputStatistics, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Fisher row means (out_features,) and column means (in_features,) in float64, checked as ``require`` does."""
    rows = _non_negative("fisher_rows", statistics.fisher_rows, (out_features,))
    return rows, _non_negative("fisher_columns", statistics.fisher_columns, (in_features,))


def require_flattening(statistics: InputStatistics, in_features: int) -> Tensor | None:
    """What the layer's input was divided by, (in_features,) float64, checked; None when it was not."""
    if statistics.flattening is None:
        return None
    return _non_negative("flattening", statistics.flattening, (in_features,))


def _checked(name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if values is None:
        raise CalibrationError(f"the statistic {name} was not collected; calibrate for a method that requires it")
    if tuple(values.shape) != shape:
        raise CalibrationError(f"the statistic {name} has shape {tuple(values.shape)}; expected {shape}")
    for rows in torch.split(values, _ROWS_AT_ONCE):
        if not rows.isfinite().all():
            raise CalibrationError(
                f"the statistic {name} is not finite; look for inf or nan in the activations of the checkpoint "
                f"(half-precision overflow is the usual cause: calibrate in float32)"
            )
    return values.double()


def _non_negative(name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    values = _checked(name, values, shape)
    if (values.diagonal() if values.dim() == 2 else values).min() < 0:
        raise CalibrationError(f"the statistic {name} has a negative entry where only squares or magnitudes are summed")
    return values


def _check_symmetric(name: str, matrix: Tensor) -> None:
    tolerance = 1e-4 * float(matrix.diagonal().max())
    for start in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        rows, columns = matrix[start:end], matrix[:, start:end].T
        if float((rows - columns).abs().max()) > tolerance:
            raise CalibrationError(f"the statistic {name} is not symmetric; it was not accumulated as E[x^T x]")
