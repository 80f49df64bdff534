"""Compile every Triton kernel for every tile ahead of time and write ``docs/gpu-kernels.md``; needs no GPU.

Usage: python -m tools.triton_table [--arch 80 90 100] [--output FILE]; takes some minutes
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.kernels.triton.compile import Resources
    from models.kernels.triton.variant import Variant

ARCHITECTURES = (80, 90, 100)
OUTPUT = Path("docs/gpu-kernels.md")
HEAD = """# The Triton kernels, compiled ahead of time

Written by `python -m tools.triton_table` with Triton {version}. No GPU is needed for it: each kernel is compiled for
the architecture named, down to machine code, with each row of the table of tiles (`models/kernels/triton/tiles.py`),
and NVIDIA's assembler reports what it takes. A test compiles some of them on every run, and all of them under
`make test-all`: a tile that spills registers, or takes more shared memory than a block may have, fails it.

Nothing here is a measurement of speed: the tiles are guesses until `python -m tools.tune_tiles` has run on a card.

- **rows**: up to how many rows of input the tile is chosen for
- **tile**: rows x output channels x input channels; **parts**: most parts the input channels are divided into
- **registers**: per thread, of 255; **shared**: KiB per block, of {limits}
"""
COLUMNS = ("kernel", "rows", "tile", "parts", "warps", "stages", "registers", "spilled bytes", "shared")

Result = tuple["Variant", "Resources"]


def render(results: Iterable[Result], version: str) -> str:
    """The document: a table for each architecture."""
    from models.kernels.triton.tiles import SHARED_MEMORY

    by_arch: dict[int, list[Result]] = {}
    for variant, resources in results:
        by_arch.setdefault(variant.arch, []).append((variant, resources))
    limits = ", ".join(f"{SHARED_MEMORY[arch]} on sm_{arch}" for arch in by_arch)
    text = HEAD.format(version=version, limits=limits)
    for arch, rows in by_arch.items():
        text += f"\n## sm_{arch}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        text += "".join(f"| {' | '.join(_cells(*row))} |\n" for row in rows)
    return text


def _cells(variant: "Variant", resources: "Resources") -> tuple[str, ...]:
    from models.kernels.triton.tiles import ANY_ROWS

    tile = variant.tile
    where = ("", "", "")
    if tile is not None:
        rows = "more" if tile.max_rows == ANY_ROWS else str(tile.max_rows)
        where = (rows, f"{tile.block_m} x {tile.block_n} x {tile.block_k}", str(tile.max_split))
    numbers = (variant.num_warps, variant.num_stages, resources.num_registers, resources.spill_bytes)
    return (variant.title, *where, *map(str, numbers), f"{resources.shared_bytes / 1024:.0f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, report every binary that ought not to be chosen, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from models.kernels.triton.compile import all_variants, compile_variant

    results: list[Result] = []
    for arch in options.arch:
        for variant in all_variants(arch):
            resources = compile_variant(variant)
            results.append((variant, resources))
            obstacle = resources.obstacle(arch)
            print(f"sm_{arch} {variant.title}: {obstacle or 'fits'}", flush=True)
    options.output.write_text(render(results, triton.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
