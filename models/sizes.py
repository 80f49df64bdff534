"""Sizes as people write them."""

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def parse_size(value: object) -> object:
    """``"512MiB"``, ``"2G"``, ``"1.5 GiB"`` or a plain number, in bytes; what is no text is passed on.

    Raises:
        ValueError: a text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
