"""``qerve export gguf``: a model for llama.cpp, and the correction as a LoRA adapter beside it.

llama.cpp adds an adapter's product to a quantized one as the artifact does. Where a layer's codes fit a block type they
go over as they are (``gguf_blocks``); any other layer is rounded anew, and the proof says how far off that is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ..artifact.reader import ArtifactReader
from ..artifact.record import LinearRecord
from ..errors import ExportError
from ..llama.gguf import ROPE_FACTORS, gguf_name
from ..scheme import EMBEDDING, HEAD, PER_CHANNEL
from ..types import LinearWeights
from .files import staged
from .gguf_adapter import write_gguf_adapter
from .gguf_blocks import (
    BLOCK,
    KINDS,
    WeightKind,
    code_blocks,
    holds_exactly,
    nearest_blocks,
    smallest_exact,
)
from .gguf_file import Entry, write_gguf
from .gguf_metadata import FILE_TYPES, QUANTIZATION_VERSION, architecture, network_metadata, rope_factors, row_order
from .gguf_reread import check_tokenizer
from .gguf_tokenizer import tokenizer_metadata
from .reread import Layout
from .source import ExportSource, cast, dense_weight, plain_codes
from .verify import Verification, prove

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
_README = """\
# {name} for llama.cpp

```
llama-cli -m model.gguf{lora} -p "..."
```

{body}`verification.json` says how far these files are from the artifact; `qerve export verify THIS_DIRECTORY` measures
again.
"""
_WITH_ADAPTER = "`adapter.gguf` is the correction of the quantization's error: without it the model runs uncorrected.\n"


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Choices of an export for llama.cpp.

    kind:          block type of the weights; auto: per layer the smallest that holds its codes exactly, else q8_0
    merge:         the correction is added to the weights, which are then rounded: q8_0 (auto) or f16, no adapter
    pre_tokenizer: ``tokenizer.ggml.pre``; None: recognised
    """

    kind: WeightKind = "auto"
    merge: bool = False
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.merge and self.kind not in ("auto", "q8_0", "f16"):
            raise ExportError(
                f"--merge --type {self.kind}: rounded to 5 bits or less again, the weights would lose the correction; "
                "choose q8_0 or f16, or leave --merge out and run the adapter"
            )


def export_gguf(artifact: Path, out: Path, options: GgufOptions, *, overwrite: bool = False) -> Verification:
    """Write the artifact for llama.cpp into directory ``out``, and prove it.

    Raises:
        ArtifactError: the artifact cannot be read.
        ExportError: llama.cpp has no such network or tokenizer, or ``out`` is taken.
    """
    with ArtifactReader.open(artifact) as reader, staged(out, overwrite=overwrite) as directory:
        source = ExportSource(reader)
        writer = _ModelWriter(source, options)
        where = str(reader.path)
        metadata = {
            "general.type": "model",
            "general.name": out.name,
            "general.quantization_version": QUANTIZATION_VERSION,
            "general.file_type": FILE_TYPES[writer.most_common_kind],
            **network_metadata(source.config, where),
            **tokenizer_metadata(reader.tokenizer_files, source.config.vocab_size, options.pre_tokenizer, where),
        }
        write_gguf(directory / MODEL_FILE, architecture(source.config), metadata, list(writer.entries()))
        check_tokenizer(directory / MODEL_FILE, source)
        has_adapter = not options.merge and any(it.rank for it in source.manifest.linears.values())
        if has_adapter:
            write_gguf_adapter(directory / ADAPTER_FILE, source)
        lora, body = (f" --lora {ADAPTER_FILE}", _WITH_ADAPTER) if has_adapter else ("", "")
        page = _README.format(name=out.name, lora=lora, body=body)
        (directory / "README.md").write_text(page, encoding="utf-8")
        layout = Layout("gguf", MODEL_FILE, ADAPTER_FILE if has_adapter else None)
        return prove(directory, layout, source, writer.notes())


class _ModelWriter:
    """Tensors of the model file, types decided from the manifest alone."""

    def __init__(self, source: ExportSource, options: GgufOptions) -> None:
        self._source = source
        self._options = options
        self._kinds = {path: self._choose(record) for path, record in source.manifest.linears.items()}

    @property
    def most_common_kind(self) -> str:
        """Of the linear layers, by the name in ``KINDS``."""
        kinds = [kind for kind, _ in self._kinds.values()]
        most = max(set(kinds), key=lambda kind: (kinds.count(kind), -kind))
        return next(name for name, kind in KINDS.items() if kind == most)

    def notes(self) -> list[str]:
        """What is not exact, in words."""
        rounded: dict[Kind, int] = {}
        for kind, is_exact in self._kinds.values():
            if not is_exact:
                rounded[kind] = rounded.get(kind, 0) + 1
        notes = [
            f"{count} of {len(self._kinds)} layers are rounded to {kind.name}: their codes do not fit it exactly"
            for kind, count in rounded.items()
        ]
        if self._source.config.sliding_window is not None:
            notes.append("llama.cpp runs this architecture without its sliding window: alike up to its width")
        return notes

    def entries(self) -> Iterator[Entry]:
        """Every tensor, in network order."""
        config, source = self._source.config, self._source
        for index in (None, *range(config.num_hidden_layers)):
            for name in source.dense_names(index):
                yield self._dense_entry(name)
            for path in () if index is None else config.layer_linear_shapes(index):
                record = source.manifest.linears[path]
                shape = (record.out_features, record.in_features)
                yield Entry(gguf_name(f"{path}.weight"), self._kinds[path][0], shape, partial(self._weight, path))
                if record.has_bias:
                    yield Entry(gguf_name(f"{path}.bias"), Kind.F32, shape[:1], partial(self._bias, path))
        factors = rope_factors(config)
        if factors is not None:
            yield Entry(ROPE_FACTORS, Kind.F32, tuple(factors.shape), factors.numpy)

    def _choose(self, record: LinearRecord) -> tuple[Kind, bool]:
        """The block type of a layer, and whether it holds the codes exactly."""
        options, scheme, columns = self._options, record.scheme, record.in_features
        can_keep = not (options.merge or record.rotation_block or record.has_input_scale)
        can_keep &= not record.has_channel_order or scheme.group_size == PER_CHANNEL
        if options.kind == "auto":
            exact = smallest_exact(scheme, columns) if can_keep else None
            if exact is not None:
                return exact, True
            return (Kind.Q8_0 if columns % BLOCK == 0 else Kind.F16), False
        kind = KINDS[options.kind]
        if kind != Kind.F16 and columns % BLOCK:
            return Kind.F16, False
        return kind, can_keep and holds_exactly(kind, scheme, columns)

    def _weight(self, path: str) -> npt.NDArray[Any]:
        weights = self._source.reader.linear(path)
        kind, is_exact = self._kinds[path]
        order = row_order(self._source.config, path, weights.quantized.out_features)
        if is_exact or self._keeps_codes(kind, weights):
            quantized = plain_codes(path, weights, "use --type q8_0")
            cast(f"{path}.weight_scale", quantized.scale, torch.float16)
            return code_blocks(quantized if order is None else quantized.rows(order), kind)
        weight = dense_weight(weights, has_correction=self._options.merge)
        return nearest_blocks(weight if order is None else weight[order], kind)

    @staticmethod
    def _keeps_codes(kind: Kind, weights: LinearWeights) -> bool:
        """q4_1 keeps asymmetric codes of up to 4 bits; only where they begin is rounded."""
        scheme = weights.quantized.scheme
        is_plain = weights.input_scale is None and weights.channel_order is None and not weights.rotation_block
        fits = scheme.format == "int" and scheme.num_bits <= 4
        return (
            kind == Kind.Q4_1 and is_plain and fits and scheme.group_length(weights.quantized.in_features) % BLOCK == 0
        )

    def _bias(self, path: str) -> npt.NDArray[Any]:
        bias = self._source.reader.linear(path).bias
        assert bias is not None  # noqa: S101 - its record says there is one
        order = row_order(self._source.config, path, len(bias))
        return _float(bias if order is None else bias[order])

    def _dense_entry(self, name: str) -> Entry:
        """Norms in float32; embedding and head as the codes they have, or in float16."""
        path = name.removesuffix(".weight")
        config = self._source.reader.config
        if path not in (EMBEDDING, HEAD):
            return Entry(gguf_name(name), Kind.F32, (config.hidden_size,), lambda: _float(self._source.tensor(name)))
        record = self._source.manifest.vocabulary.get(path)
        kind = None if record is None else smallest_exact(record.scheme, config.hidden_size)
        shape = (config.vocab_size, config.hidden_size)
        return Entry(gguf_name(name), kind or Kind.F16, shape, partial(self._vocabulary, path, kind))

    def _vocabulary(self, path: str, kind: Kind | None) -> npt.NDArray[Any]:
        if kind is not None:
            return code_blocks(self._source.reader.linear(path).quantized, kind)
        name = f"{path}.weight"
        array: npt.NDArray[Any] = cast(name, self._source.tensor(name), torch.float16).numpy()
        return array


def _float(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array
