"""What a weight must be before it can be quantized."""

from torch import Tensor

from ..errors import SchemeError
from ..scheme import QuantScheme


def check_weight(weight: Tensor, scheme: QuantScheme) -> None:
    """Check ``weight`` against ``scheme``.

    Raises:
        SchemeError: not a floating-point matrix, empty, groups that do not tile its rows, or a value that is not finite
            in float32.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SchemeError(f"a weight is a floating-point matrix, not {weight.dtype} of shape {tuple(weight.shape)}")
    where = f"a weight of shape {tuple(weight.shape)}"
    if 0 in weight.shape:
        raise SchemeError(f"{where} is empty and cannot be quantized")
    scheme.check(weight.shape[1], where)
    finite = weight.float().isfinite()
    if not finite.all():
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise SchemeError(
            f"{where} holds {float(weight[row, column])} at row {row}, column {column}; it must be finite in float32"
        )
