"""``qerve export dense``: codes and correction as one matrix per layer, a plain Hugging Face checkpoint.

Takes every artifact, rotated and permuted ones too; what is lost is the size, and the last bits of the weights.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.reader import ArtifactReader
from .files import staged, write_companions, write_shards
from .reread import Layout
from .source import EXPORT_DTYPES, ExportSource, cast, dense_weight
from .verify import Verification, prove


def export_dense(artifact: Path, out: Path, dtype: str = "bfloat16", *, overwrite: bool = False) -> Verification:
    """Write the corrected weights of the artifact as a Hugging Face checkpoint into ``out``, and prove it.

    Raises:
        ArtifactError: the artifact cannot be read.
        ExportError: ``out`` is taken, or a value is beyond the range of ``dtype``.
    """
    with ArtifactReader.open(artifact) as reader, staged(out, overwrite=overwrite) as directory:
        source = ExportSource(reader)
        write_dense(directory, source, dtype, has_correction=True)
        return prove(directory, Layout("dense", "."), source, [f"weights are rounded to {dtype}"])


def write_dense(directory: Path, source: ExportSource, dtype: str, *, has_correction: bool) -> None:
    """Write a Hugging Face checkpoint of the weights, corrected or as the codes alone have them."""
    shards = _shards(source, EXPORT_DTYPES[dtype], has_correction)
    write_shards(directory, shards, source.config.num_hidden_layers + 1)
    write_companions(directory, source, source.hf_config(dtype))


def _shards(source: ExportSource, dtype: torch.dtype, has_correction: bool) -> Iterator[dict[str, Tensor]]:
    for index in (*range(source.config.num_hidden_layers), None):
        tensors = {name: cast(name, source.tensor(name), dtype) for name in source.dense_names(index)}
        for path in () if index is None else source.config.layer_linear_shapes(index):
            weights = source.reader.linear(path)
            weight = dense_weight(weights, has_correction=has_correction)
            tensors[f"{path}.weight"] = cast(f"{path}.weight", weight, dtype)
            if weights.bias is not None:
                tensors[f"{path}.bias"] = cast(f"{path}.bias", weights.bias, dtype)
        yield tensors
