"""Writes the roofline tables of ``docs/gpu.md``: ``python -m tools.roofline [--write]``."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from models.bench.cards import CARDS, TABLED, card_named
from models.bench.roofline import (
    BATCH_SIZES,
    JOINED,
    RANK,
    W4A8,
    W4A16,
    LayerCost,
    Scheme,
    Shape,
    network_shapes,
    num_bytes,
    operations,
    seconds,
)

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
_BEGIN, _END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


def main() -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(description="Roofline of quantized linear layers with low-rank terms.")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name} instead of standard output")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


def with_tables(document: str) -> str:
    """``document`` with the tables as they are now between its markers."""
    return re.sub(f"{_BEGIN}.*{_END}", lambda _: f"{_BEGIN}\n{tables()}\n{_END}", document, flags=re.DOTALL)


def tables() -> str:
    """All tables, in Markdown."""
    parts = [
        "\n".join(_cards()),
        "Factors of rank 32 as a share of the quantized layer (codes in groups of 64 with 16-bit scales):",
        "\n".join(_factors()),
    ]
    for scheme in (W4A16, W4A8):
        parts += [f"{scheme.name}, groups of 64, rank {RANK}, 16-bit factors. Times in microseconds, fused / unfused:"]
        parts += ["\n".join(_times(scheme))]
    return "\n\n".join(parts)


def _cards() -> Iterator[str]:
    yield "| card | memory GB/s | bf16 Tops/s | int8 Tops/s | memory GB | L2 MiB | source |"
    yield "|---|---|---|---|---|---|---|"
    for card in CARDS:
        yield (
            f"| {card.name} | {card.bandwidth / 1e9:.0f} | {card.bf16 / 1e12:.0f} | {card.int8 / 1e12:.0f} | "
            f"{card.memory / 1e9:.0f} | {card.l2 / 2**20:.0f} | {card.source} |"
        )


def _factors() -> Iterator[str]:
    yield "| network | layer | W4 MB | 16-bit factors | 8-bit factors | W8: 16-bit factors | W8: 8-bit factors |"
    yield "|---|---|---|---|---|---|---|"
    for shape in network_shapes():
        narrow, wide = Scheme(4, 64, 16), Scheme(8, 64, 8)
        shares = [LayerCost(shape, it, 1, RANK, bits).factor_share for it in (narrow, wide) for bits in (16, 8)]
        cells = " | ".join(f"{share:.1%}" for share in shares)
        size = LayerCost(shape, narrow, 1).weight_bytes / 1e6
        yield f"| {shape.network} | {_described(shape)} | {size:.1f} | {cells} |"


def _times(scheme: Scheme) -> Iterator[str]:
    cards = [card_named(name) for name in TABLED]
    names = " | ".join(card.name for card in cards)
    yield f"| network | layer | M | MB at rank 0 | fused adds | unfused adds | Gop | {names} |"
    yield "|---|---|---|---|---|---|---|" + "---|" * len(cards)
    for shape in network_shapes(JOINED):
        for num_rows in BATCH_SIZES:
            cost = LayerCost(shape, scheme, num_rows)
            plain = num_bytes(cost.plain)
            cells = [
                shape.network,
                _described(shape),
                str(num_rows),
                f"{plain / 1e6:.1f}",
                f"{num_bytes(cost.fused) / plain - 1:.1%}",
                f"{num_bytes(cost.unfused) / plain - 1:.1%}",
                f"{operations(cost.fused) / 1e9:.2f}",
            ]
            cells += [f"{seconds(cost.fused, it) * 1e6:.1f} / {seconds(cost.unfused, it) * 1e6:.1f}" for it in cards]
            yield f"| {' | '.join(cells)} |"


def _described(shape: Shape) -> str:
    return f"{shape.name} {shape.out_features} x {shape.in_features}"


if __name__ == "__main__":
    main()
