"""How long qera-exact takes once the statistics are there: all layers of a checkpoint, or one large layer by itself.

    python -m tools.bench_qera --checkpoint .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m tools.bench_qera --shape 4096x11008

Statistics are made up (a spectrum over six decades), since the work does not depend on their values. Seconds are wall
clock and cover rounding, reconstruction and storing the factors; memory is what was held above the statistics.
"""

import argparse
import json
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from models.config import ReconstructConfig
from models.llama.checkpoint import open_checkpoint
from models.memory import PeakMemory, map_large_blocks, return_freed_memory
from models.quant.rtn import quantize_rtn
from models.reconstruct import get_reconstructor
from models.scheme import PER_CHANNEL, QuantScheme
from models.types import InputStatistics

SCHEME = QuantScheme(num_bits=4, group_size=PER_CHANNEL)


@dataclass(frozen=True, slots=True)
class Timing:
    """One layer: (out_features, in_features), wall seconds, bytes above what was held before."""

    shape: tuple[int, int]
    seconds: float
    peak_bytes: int


def autocorrelation(in_features: int, generator: torch.Generator) -> Tensor:
    """(in_features, in_features) float64, positive definite, with eigenvalues over about six decades."""
    sizes = torch.logspace(0, -3, in_features, dtype=torch.float32)
    tokens = torch.randn(in_features + 64, in_features, generator=generator) * sizes
    mixed = tokens + tokens.roll(1, 1) * 0.5
    return (mixed.T @ mixed / len(mixed)).double()


def reconstruct(weight: Tensor, statistics: InputStatistics, rank: int) -> Timing:
    """Time one layer."""
    method = get_reconstructor(ReconstructConfig("qera-exact", rank))
    return_freed_memory()
    with PeakMemory() as memory:
        started = time.perf_counter()
        method.reconstruct(weight, statistics, lambda dense: quantize_rtn(dense, SCHEME))
        seconds = time.perf_counter() - started
    return Timing((weight.shape[0], weight.shape[1]), seconds, memory.growth_bytes)


def checkpoint_timings(path: str, rank: int) -> list[Timing]:
    """Every linear layer of a checkpoint."""
    checkpoint, generator = open_checkpoint(path), torch.Generator().manual_seed(0)
    shapes = checkpoint.config.linear_shapes()
    widths = {shape.in_features for shape in shapes.values()}
    statistics = {width: InputStatistics(2 * width, autocorrelation(width, generator)) for width in sorted(widths)}
    return [
        reconstruct(checkpoint.tensor(f"{name}.weight").float(), statistics[shape.in_features], rank)
        for name, shape in shapes.items()
    ]


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="directory or .gguf file")
    what.add_argument("--shape", help="OUTxIN of one layer with made-up weights")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    map_large_blocks()
    if options.checkpoint:
        timings = checkpoint_timings(options.checkpoint, options.rank)
    else:
        out_features, in_features = map(int, options.shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        statistics = InputStatistics(in_features, autocorrelation(in_features, generator))
        weight = torch.randn(out_features, in_features, generator=generator) * 0.02
        timings = [reconstruct(weight, statistics, options.rank)]
    for shape in sorted({timing.shape for timing in timings}):
        seconds = [timing.seconds for timing in timings if timing.shape == shape]
        print(f"{shape[0]:6d} x {shape[1]:<6d} {len(seconds):4d} layers  median {median(seconds):.3f} s")
    total, peak = sum(timing.seconds for timing in timings), max(timing.peak_bytes for timing in timings)
    print(f"total {total:.1f} s, peak memory of one layer {peak / 2**20:.0f} MiB above its statistics")
    print(
        json.dumps({"seconds": round(total, 2), "peak_bytes": peak, "num_layers": len(timings), "rank": options.rank})
    )


if __name__ == "__main__":
    main()
