"""What graphics cards can do at most, by their makers' data sheets: the limits of a roofline.

Throughputs are of dense matrices: the sheets' figures "with sparsity" are twice as much. The GeForce figure for 16 bits
is that with float32 accumulation, which is what linear layers use.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """One card.

    name:         short
    device_names: as the driver calls it
    bandwidth:    of its memory, bytes per second
    bf16, int8:   operations per second of the tensor cores; a multiply-add is two
    memory:       bytes
    l2:           bytes
    source:       where the figures come from
    """

    name: str
    device_names: tuple[str, ...]
    bandwidth: float
    bf16: float
    int8: float
    memory: float
    l2: float
    source: str


CARDS = (
    Card("A100 80GB SXM", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"), 2039e9, 312e12, 624e12, 80e9, 40 << 20,
         "NVIDIA A100 Tensor Core GPU data sheet; L2: A100 architecture white paper"),
    Card("L4", ("NVIDIA L4",), 300e9, 121e12, 242e12, 24e9, 48 << 20,
         "NVIDIA L4 Tensor Core GPU data sheet; L2: Ada GPU architecture white paper"),
    Card("H100 SXM", ("NVIDIA H100 80GB HBM3",), 3350e9, 989e12, 1979e12, 80e9, 50 << 20,
         "NVIDIA H100 Tensor Core GPU data sheet; L2: H100 architecture white paper"),
    Card("H200 SXM", ("NVIDIA H200",), 4800e9, 989e12, 1979e12, 141e9, 50 << 20,
         "NVIDIA H200 Tensor Core GPU data sheet"),
    Card("A10", ("NVIDIA A10",), 600e9, 125e12, 250e12, 24e9, 6 << 20,
         "NVIDIA A10 Tensor Core GPU data sheet"),
    Card("RTX 4090", ("NVIDIA GeForce RTX 4090",), 1008e9, 165.2e12, 660.6e12, 24e9, 72 << 20,
         "NVIDIA Ada GPU architecture white paper"),
)  # fmt: skip
TABLED = ("A100 80GB SXM", "L4", "H100 SXM")
"""Those that ``docs/gpu.md`` shows."""


def card_of(device_name: str) -> Card | None:
    """The card that the driver calls ``device_name``; None: its limits are not known."""
    return next((card for card in CARDS if device_name in card.device_names), None)


def card_named(name: str) -> Card:
    """The card with the short ``name``.

    Raises:
        KeyError: there is none.
    """
    for card in CARDS:
        if card.name == name:
            return card
    raise KeyError(name)
