"""Round to nearest: the base quantizer that looks at nothing but the weight."""

from torch import Tensor

from ..scheme import QuantScheme
from ..types import QuantizedWeight
from .grid import choose_grid, quantize


def quantize_rtn(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Nearest codes of the grid that spans each group of ``weight`` (out_features, in_features).

    Raises:
        SchemeError: a weight that ``scheme`` cannot hold: shape, groups, not finite, or too large for float16 scales.
    """
    scale, zero_point = choose_grid(weight, scheme)
    return quantize(weight, scale, zero_point, scheme)
