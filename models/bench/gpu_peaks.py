"""What a GPU does at most: by its data sheet where the card is known, measured in any case."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cards import Card, card_of
from .device_clock import DeviceClock
from .probe import BYTES_PER_SECOND, OPERATIONS_PER_SECOND, Probe, ProbeError, Samples

COPY, BF16, INT8 = "memory copy", "bf16 products", "int8 products"
_COPIED_BYTES = 1 << 30
_SIZE = 8192


@dataclass(frozen=True, slots=True)
class PeakSizes:
    """Bytes copied, and the width of the square matrices that are multiplied."""

    copied_bytes: int = _COPIED_BYTES
    width: int = _SIZE


def gpu_peak_probes(device: torch.device, clock: DeviceClock, sizes: PeakSizes | None = None) -> Iterator[Probe]:
    """Bandwidth of a copy (each byte is read and written), and products of large square matrices by torch."""
    sizes = sizes or PeakSizes()
    source = torch.ones(sizes.copied_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    yield Probe((COPY,), BYTES_PER_SECOND, lambda: (2 * source.nbytes / clock.seconds(lambda: target.copy_(source)),))
    operations = 2 * sizes.width**3
    wide = torch.ones(sizes.width, sizes.width, dtype=torch.bfloat16, device=device)
    yield Probe((BF16,), OPERATIONS_PER_SECOND, lambda: (operations / clock.seconds(lambda: torch.mm(wide, wide)),))
    narrow = torch.ones(sizes.width, sizes.width, dtype=torch.int8, device=device)

    def multiply() -> tuple[float]:
        try:
            return (operations / clock.seconds(lambda: torch._int_mm(narrow, narrow.T)),)
        except RuntimeError as error:
            raise ProbeError(f"torch's int8 product: {str(error).splitlines()[0]}") from error

    yield Probe((INT8,), OPERATIONS_PER_SECOND, multiply)


def card_here(device_name: str, samples: Samples, properties: Any) -> Card:
    """The card with its limits: of the data sheet, or as ``samples`` have them where the card is not known."""
    known = card_of(device_name)
    if known is not None:
        return known
    bf16 = samples.median(BF16) or float("inf")
    return Card(
        device_name,
        (device_name,),
        samples.median(COPY) or float("inf"),
        bf16,
        samples.median(INT8) or bf16,
        properties.total_memory,
        properties.L2_cache_size,
        "measured here: a copy, products of large matrices",
    )
