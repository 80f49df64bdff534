"""Kernels compiled ahead of time for cards that are not here: no spills, no more shared memory than a block has.

Compiling needs a process without ``TRITON_INTERPRET``, and Triton's own assembler: both are had without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.kernels.triton.environment import TritonEnvironment
from models.kernels.triton.tiles import ANY_ROWS, SHARED_MEMORY, TILES
from tools.triton_table import render

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    TritonEnvironment.read().why_not(torch.device("cpu")) is not None, reason="triton is not installed"
)
SCRIPT = """
import json, sys
from models.kernels.triton.compile import all_variants, compile_variant
from models.kernels.triton.tiles import ANY_ROWS

arch, wanted = int(sys.argv[1]), sys.argv[2:]
for variant in all_variants(arch):
    rows = "" if variant.tile is None else f" up to {variant.tile.max_rows}"
    name = variant.title + rows
    if not wanted or any(name.startswith(it) for it in wanted):
        it = compile_variant(variant)
        print(json.dumps([name, it.num_registers, it.spill_bytes, it.shared_bytes, it.obstacle(arch)]), flush=True)
"""


def compiled(arch: int, *names: str, folder: Path) -> list[list[object]]:
    """[name, registers, spilled bytes, shared bytes, obstacle] of the binaries for ``arch`` whose names begin so."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(arch), *names],
        capture_output=True, text=True, env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def assert_fit(found: list[list[object]], arch: int) -> None:
    for name, registers, spills, shared, obstacle in found:
        assert obstacle is None, f"{name}: {obstacle}"
        assert spills == 0
        assert 0 < int(str(registers)) <= 255
        assert 0 < int(str(shared)) <= SHARED_MEMORY[arch] * 1024


def test_kernels_of_two_regimes_fit_an_h100(tmp_path: Path) -> None:
    scheme = "INT4 asymmetric, group 64, rank 32 up to"
    names = (
        f"split, {scheme} 16",
        f"tiled, {scheme} {ANY_ROWS}",
        f"split, {scheme.replace('up to', 'in INT8 up to')} 16",
    )
    found = compiled(90, *names, folder=tmp_path)
    assert len(found) == len(names)
    assert_fit(found, 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_every_kernel_with_every_tile_fits(arch: int, tmp_path: Path) -> None:
    found = compiled(arch, folder=tmp_path)
    assert len(found) > sum(tile.arch == arch for tile in TILES)
    assert_fit(found, arch)


def test_the_table_has_a_row_for_each_binary_under_its_architecture() -> None:
    from models.kernels.triton.compile import Resources, all_variants

    variants = [next(all_variants(arch)) for arch in (80, 90)]
    text = render([(it, Resources(168, 0, 40 * 1024)) for it in variants], "3.9.0")
    for variant in variants:
        section = text.split(f"## sm_{variant.arch}\n")[1].split("## ")[0]
        (row,) = (line for line in section.splitlines() if variant.title in line)
        assert row.endswith("| 168 | 0 | 40 |")
    assert "163 on sm_80, 227 on sm_90" in text


@pytest.mark.parametrize(
    ("resources", "obstacle"),
    [((255, 8, 1024), "spills 8 bytes"), ((64, 0, 100 * 1024), "100 KiB of shared memory, sm_89 has 99")],
)
def test_a_binary_that_spills_or_takes_too_much_shared_memory_is_refused(
    resources: tuple[int, int, int], obstacle: str
) -> None:
    from models.kernels.triton.compile import Resources

    assert obstacle in (Resources(*resources).obstacle(89) or "")
    assert Resources(255, 0, 99 * 1024).obstacle(89) is None


def test_nothing_is_compiled_while_kernels_are_interpreted(tmp_path: Path) -> None:
    from models.errors import KernelError
    from models.kernels.triton.compile import all_variants, compile_variant

    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        compile_variant(next(all_variants(90)))
