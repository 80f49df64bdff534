"""``qerve export peft``: the codes as a frozen base, the correction as the adapter that fine-tuning begins with.

A zero adapter starts at the quantized network; one that corrects its error starts nearer to the dense one (LoftQ,
arXiv 2310.08659; QERA, arXiv 2410.06040, section 4.2). The base is either the dequantized codes as a plain checkpoint,
or NF4 codes as bitsandbytes stores them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..artifact.reader import ArtifactReader
from ..errors import ExportError
from .adapter import adapter_rank, write_adapter
from .bnb import nf4_config, nf4_tensors
from .dense import write_dense
from .files import staged, write_companions, write_shards
from .reread import Layout
from .source import EXPORT_DTYPES, ExportSource, cast, plain_codes
from .verify import Verification, prove

Base = Literal["dense", "nf4"]

_README = """\
# {name} for PEFT

`base/` holds the quantized weights ({base}), `adapter/` the correction of their error: rank {rank}, where fine-tuning
begins.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
```

The base stays as it is; training changes the adapter alone. {more}`verification.json` says how far both together are
from the artifact; `qerve export verify THIS_DIRECTORY` measures again.
"""
_NF4 = "The base needs bitsandbytes. "


def export_peft(artifact: Path, out: Path, base: Base, dtype: str, *, overwrite: bool = False) -> Verification:
    """Write the artifact as base and trainable adapter into directory ``out``, and prove it.

    Raises:
        ArtifactError: the artifact cannot be read.
        ExportError: there is no correction to begin with, the base has no place for the codes, or ``out`` is taken.
    """
    with ArtifactReader.open(artifact) as reader, staged(out, overwrite=overwrite) as directory:
        source = ExportSource(reader)
        rank = adapter_rank(source, None)
        if rank == 0:
            raise ExportError(
                f"{artifact}: has no correction to begin fine-tuning with; build it with --method qera-exact (or "
                "qera-approx, loftq) and --rank 16, or add a zero adapter with PEFT itself"
            )
        if base == "dense":
            (directory / "base").mkdir()
            write_dense(directory / "base", source, dtype, has_correction=False)
        else:
            _write_nf4(directory / "base", source, dtype)
        write_adapter(directory / "adapter", source, rank, torch.float32, "base")
        more = _NF4 if base == "nf4" else ""
        page = _README.format(name=out.name, base=base, rank=rank, dtype=dtype, more=more)
        (directory / "README.md").write_text(page, encoding="utf-8")
        notes = [f"the base is rounded to {dtype}"] if base == "dense" and dtype != "float32" else []
        return prove(directory, Layout("peft", "base", "adapter"), source, notes)


def _write_nf4(directory: Path, source: ExportSource, dtype: str) -> None:
    directory.mkdir()
    write_shards(directory, _nf4_shards(source, dtype), source.config.num_hidden_layers + 1)
    write_companions(directory, source, source.hf_config(dtype) | {"quantization_config": nf4_config(dtype)})


def _nf4_shards(source: ExportSource, dtype: str) -> Iterator[dict[str, Tensor]]:
    for index in (*range(source.config.num_hidden_layers), None):
        tensors = {name: cast(name, source.tensor(name), EXPORT_DTYPES[dtype]) for name in source.dense_names(index)}
        for path in () if index is None else source.config.layer_linear_shapes(index):
            weights = source.reader.linear(path)
            tensors |= nf4_tensors(path, plain_codes(path, weights, "use --base dense"), dtype)
            if weights.bias is not None:
                tensors[f"{path}.bias"] = cast(f"{path}.bias", weights.bias, EXPORT_DTYPES[dtype])
        yield tensors
