"""Values on their way to JSON."""

import math
from typing import Any


def finite(values: Any) -> Any:
    """``values`` (nested dicts, lists, tuples) with None in place of what is not a finite number: JSON has no NaN."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
