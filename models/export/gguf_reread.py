"""GGUF exports read back: blocks by the ``gguf`` package, names and order of rows by the reader of checkpoints."""

from pathlib import Path

import torch
from gguf import GGUFReader
from torch import Tensor

from ..errors import ExportError
from ..llama.gguf import GgufCheckpoint, gguf_name, undo_row_permutation
from ..llama.tokenizer import Tokenizer
from .source import ExportSource

_TEXTS = (
    "The river runs past 24 old mills.\n\n  It's 1999, isn't it?",
    "def f(x):\n    return x + 1  # Ünïcödé 日本語 🙂",
)


class GgufBase:
    """The model file as a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._checkpoint = GgufCheckpoint(path)
        self.config = self._checkpoint.config

    def tensor(self, name: str) -> Tensor:
        """A dense parameter by its Hugging Face name."""
        return self._checkpoint.tensor(name)

    def weight(self, path: str) -> Tensor:
        """The weight of a linear layer, (out_features, in_features) float64."""
        return self.tensor(f"{path}.weight").double()


def read_gguf_adapter(path: Path, model: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (up, down) of an adapter for ``model``, its scaling taken into up.

    Raises:
        ExportError: it is no LoRA adapter, or has tensors for layers that the model does not have.
    """
    reader = GGUFReader(path)
    kind = reader.fields.get("adapter.type")
    if kind is None or kind.contents() != "lora":
        raise ExportError(f"{path}: is no LoRA adapter")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {it.name: torch.from_numpy(it.data.copy()) for it in reader.tensors}
    config = GgufCheckpoint(model).config
    is_permuted = reader.fields["general.architecture"].contents() == "llama"
    factors = {}
    for module in config.linear_shapes():
        name = gguf_name(f"{module}.weight")
        if f"{name}.lora_a" not in tensors:
            continue
        down, up = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        if is_permuted and module.endswith((".q_proj", ".k_proj")):
            up = undo_row_permutation(up, config.head_dim)
        factors[module] = (up * (alpha / len(down)), down)
    if tensors:
        raise ExportError(f"{path}: tensor {min(tensors)} belongs to no layer of {model.name}")
    return factors


def check_tokenizer(path: Path, source: ExportSource) -> None:
    """Read the tokenizer of the model file back, and have both cut the same texts.

    Raises:
        ExportError: they differ.
    """
    written = Tokenizer.from_files(GgufCheckpoint(path).tokenizer_files)
    original = Tokenizer.from_files(source.reader.tokenizer_files)
    for text in _TEXTS:
        if written.encode(text) != original.encode(text):
            raise ExportError(
                f"{source.reader.path}: its tokenizer does not come through GGUF, where {text!r} becomes other tokens; "
                "give llama.cpp's name for it with --pre-tokenizer"
            )
