"""The correction as llama.cpp's LoRA adapter: ``NAME.weight.lora_a`` (rank, in), ``NAME.weight.lora_b`` (out, rank).

llama.cpp scales the product by ``adapter.lora.alpha / rank``; every layer is padded to one rank, which alpha is too.
Rows of ``lora_b`` are those of the weight, so queries and keys are interleaved as their weights are.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from ..llama.gguf import gguf_name
from .adapter import adapter_rank, padded
from .gguf_file import Entry, write_gguf
from .gguf_metadata import architecture, row_order
from .source import ExportSource, Factors, plain_factors


def write_gguf_adapter(path: Path, source: ExportSource) -> None:
    """Write the corrections of ``source``; layers without one have no tensors."""
    rank = adapter_rank(source, None)
    metadata = {
        "general.type": "adapter",
        "general.name": f"{path.parent.name} correction",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    write_gguf(path, architecture(source.config), metadata, list(_entries(source, rank)))


def _entries(source: ExportSource, rank: int) -> Iterator[Entry]:
    for path, record in source.manifest.linears.items():
        if not record.rank:
            continue
        name = gguf_name(f"{path}.weight")
        for part, shape in (("lora_a", (rank, record.in_features)), ("lora_b", (record.out_features, rank))):
            yield Entry(f"{name}.{part}", Kind.F32, shape, _content(source, path, rank, part))


def _content(source: ExportSource, path: str, rank: int, part: str) -> Callable[[], npt.NDArray[Any]]:
    return partial(_factor, source, path, rank, part)


def _factor(source: ExportSource, path: str, rank: int, part: str) -> npt.NDArray[Any]:
    factors = plain_factors(source.reader.linear(path))
    assert isinstance(factors, Factors)  # noqa: S101 - its record has a rank
    factors = padded(factors, rank)
    order = row_order(source.config, path, len(factors.up))
    up = factors.up if order is None else factors.up[order]
    array: npt.NDArray[Any] = (factors.down if part == "lora_a" else up).contiguous().numpy()
    return array
