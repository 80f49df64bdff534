"""What every export starts from: an open artifact, its layers in terms of inputs as they come.

An artifact's layer may divide, gather and rotate its input first (``LinearWeights``). No other engine does, so factors
and dense weights are written for the input as it comes (``InputTransform.undo``); codes cannot be, unless the channels
that move all share one scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..artifact.reader import ArtifactReader
from ..errors import ExportError
from ..llama.config import LlamaConfig
from ..quant.grid import dense_factors, dequantize
from ..reconstruct.loss import effective_weight
from ..scheme import EMBEDDING, HEAD, PER_CHANNEL
from ..transform.inputs import InputTransform
from ..types import LinearWeights, QuantizedWeight

EXPORT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Factors:
    """A correction over the input as it comes: ``x @ down.T @ up.T``.

    up:   (out_features, rank) float32
    down: (rank, in_features) float32
    """

    up: Tensor
    down: Tensor


def plain_factors(weights: LinearWeights) -> Factors | None:
    """The correction of a layer over its input as it comes; None without one.

    SERQ's single matrix reads the first ``rank`` channels: its ``down`` selects them, one row per channel.
    """
    if weights.correction is None or weights.correction.rank == 0:
        return None
    up, down = dense_factors(weights.correction)
    if down is None:
        down = torch.eye(up.shape[1], weights.quantized.in_features)
    undone = _transform(weights).undo(down.double())
    return Factors(up.float().contiguous(), undone.float().contiguous())


def plain_codes(path: str, weights: LinearWeights, remedy: str) -> QuantizedWeight:
    """The codes of a layer over its input as it comes.

    Channels that are gathered first are put back, where a row has a single scale.

    Raises:
        ExportError: no codes of this format say the same; the message names the layer, and ``remedy`` what to do.
    """
    quantized = weights.quantized
    if weights.rotation_block:
        raise ExportError(f"{path}: its input is rotated while it runs, which no other engine does; {remedy}")
    if weights.input_scale is not None:
        raise ExportError(f"{path}: its input is divided channel by channel, which its codes cannot take in; {remedy}")
    if weights.channel_order is None:
        return quantized
    if quantized.scheme.group_size != PER_CHANNEL:
        raise ExportError(
            f"{path}: its input channels are gathered in another order, and groups of {quantized.scheme.group_size} of "
            "them share a scale: no other engine gathers. Rebuild with --group-size -1 (one scale per row), or "
            f"{remedy}"
        )
    codes = torch.empty_like(quantized.codes).index_copy_(1, weights.channel_order.long(), quantized.codes)
    return replace(quantized, codes=codes)


def dense_weight(weights: LinearWeights, *, has_correction: bool = True) -> Tensor:
    """Codes, with or without their correction, as one matrix over the input as it comes: float64."""
    return effective_weight(weights if has_correction else replace(weights, correction=None))


def _transform(weights: LinearWeights) -> InputTransform:
    return InputTransform(weights.input_scale, weights.channel_order, weights.rotation_block)


class ExportSource:
    """An open artifact as exports read it, decoder layer by decoder layer."""

    def __init__(self, reader: ArtifactReader) -> None:
        self.reader = reader
        self.manifest = reader.manifest

    @property
    def config(self) -> LlamaConfig:
        """The network as it is exported: embedding and head dense, attention unquantized."""
        config = self.reader.config
        return replace(config, vocabulary=(), attention=None, tie_word_embeddings=self.is_tied)

    @property
    def is_tied(self) -> bool:
        """The head is the embedding, in the artifact and in the export."""
        return self.reader.config.tie_word_embeddings and HEAD not in self.reader.config.vocabulary

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """Module paths of all linear layers of the decoder, in network order."""
        return tuple(self.reader.config.linear_shapes())

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """Content for the export's ``config.json``."""
        values = dict(self.reader.hf_config)
        # Both spellings: transformers renamed it, and engines pin older ones.
        return values | {"tie_word_embeddings": self.is_tied, "dtype": dtype, "torch_dtype": dtype}

    def linears(self) -> Iterator[tuple[str, LinearWeights]]:
        """Every linear layer of the decoder, one at a time."""
        for path in self.linear_paths:
            yield path, self.reader.linear(path)

    def tensor(self, name: str) -> Tensor:
        """A dense parameter by its Hugging Face name; a quantized embedding or head is dequantized, float32."""
        path = name.removesuffix(".weight")
        vocabulary = self.reader.config.vocabulary
        is_shared_head = path == HEAD and self.reader.config.is_head_quantized
        if path in vocabulary or is_shared_head:
            return dequantize(self.reader.linear(path).quantized)
        return self.reader.tensor(name)

    def dense_names(self, layer_index: int | None) -> tuple[str, ...]:
        """Names of the dense parameters of one decoder layer; None: of everything else."""
        names = self.config.unquantized_shapes()
        if layer_index is None:
            return tuple(name for name in names if not name.startswith("model.layers."))
        return tuple(name for name in names if name.startswith(f"model.layers.{layer_index}."))

    def notes(self) -> list[str]:
        """What the export leaves behind of the artifact, whatever the target."""
        notes = []
        config = self.reader.config
        for path in config.vocabulary:
            what = "the embedding" if path == EMBEDDING else "the output head"
            notes.append(f"{what} is quantized in the artifact and dense here: the same numbers, more bytes")
        if config.attention is not None:
            notes.append(f"queries, keys and values ({config.attention}) are not quantized here")
        if any(record.activations is not None for record in self.manifest.linears.values()):
            notes.append(
                "the proof compares weights with inputs unquantized on both sides; the artifact quantizes them"
            )
        return notes


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, contiguous.

    Raises:
        ExportError: a value is beyond the range of ``dtype``.
    """
    result = tensor.to(dtype).contiguous()
    if not bool(result.isfinite().all()):
        raise ExportError(f"{name}: a value is beyond the range of {dtype}; choose --dtype bfloat16 or float32")
    return result


def cast_scale(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``cast`` for scales, none of which may become zero.

    Raises:
        ExportError: one does, or is beyond the range of ``dtype``.
    """
    result = cast(name, scale, dtype)
    if bool((result == 0).any()):
        raise ExportError(f"{name}: a scale is below the range of {dtype}; choose --dtype bfloat16 or float32")
    return result
