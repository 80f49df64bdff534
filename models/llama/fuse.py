"""From a loaded network to the same network over the native kernels, or the reason why it stays as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ..kernels.base import Selection
from ..kernels.native.backend import NativeBackend, NativeLinear
from ..kernels.native.embedding import EmbeddingTable
from ..kernels.native.inputs import LinearInput
from ..kernels.native.pack import pack_dense
from ..layers.linear import LowRankLinear
from ..types import QuantizedWeight
from .batch import Batch
from .config import LlamaConfig
from .model import DecoderLayer, LlamaForCausalLM
from .native import NativeLlama
from .native_layers import LinearGroup, NativeHead, NativeLayer, group_by_input, norm_of
from .native_programs import NativeWeights

_HEAD_DIM_MULTIPLE = 16
_MAX_HEAD_DIM = 256


class Unfused(Exception):  # noqa: N818 it is not an error: the network runs, layer by layer
    """Why a network cannot run as one list of operators; written for the user."""


def fuse(model: LlamaForCausalLM, embedding: Tensor | QuantizedWeight, cache_dtype: torch.dtype) -> NativeLlama:
    """``model`` over the native kernels. Packed weights are shared, so that ``model`` can be let go.

    A head that is not quantized is rounded to 8 bits, with a scale per row and 32 or 64 channels.

    Args:
        model: the network, its linear layers prepared by the native backend.
        embedding: (vocab_size, hidden_size), dense or codes.
        cache_dtype: of the key-value cache, float16 or int8.

    Raises:
        Unfused: something in it keeps it from running so.
    """
    if (obstacle := obstacle_of(model.config, {})) is not None:
        raise Unfused(obstacle)
    layers = tuple(_layer(index, layer) for index, layer in enumerate(model.layers) if isinstance(layer, DecoderLayer))
    first = _native(next(it for it in model.layers.modules() if isinstance(it, LowRankLinear)), "model.layers.0")
    weights = NativeWeights(model.config, EmbeddingTable.of(embedding), layers, _head(model, first))
    fused = NativeLlama(weights, first.runtime, cache_dtype)
    try:
        fused.logits(fused(Batch.uncached([[0]])))
    except KernelError as error:
        raise Unfused(str(error)) from error
    return fused


def obstacle_of(config: LlamaConfig, selections: Mapping[str, Selection]) -> str | None:
    """What keeps a network from running as one list of operators, as far as its shape and ``selections`` tell."""
    if config.rope.rope_type == "dynamic":
        return "dynamic rotary embeddings turn with the length of the sequence, the kernels take fixed tables"
    if config.head_dim % _HEAD_DIM_MULTIPLE or config.head_dim > _MAX_HEAD_DIM:
        return (
            f"heads have {config.head_dim} channels, the kernels take multiples of {_HEAD_DIM_MULTIPLE} "
            f"up to {_MAX_HEAD_DIM}"
        )
    if config.attention is not None and config.attention.format not in {"int", "mxint"}:
        return f"queries, keys and values are rounded to {config.attention.format}, the kernels take int and mxint"
    for path, selection in selections.items():
        if selection.backend.name != NativeBackend.name:
            return _other_backend(path, selection)
    return None


def _layer(index: int, layer: DecoderLayer) -> NativeLayer:
    path = f"model.layers.{index}"
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o = (_native(getattr(attention, f"{name}_proj"), f"{path}.self_attn.{name}_proj") for name in "qkvo")
    gate, up, down = (
        _native(getattr(mlp, f"{name}_proj"), f"{path}.mlp.{name}_proj") for name in ("gate", "up", "down")
    )
    if not gate.inputs.is_same_as(up.inputs):
        raise Unfused(f"{path}.mlp: gate_proj and up_proj treat their common input differently")
    columns = (0, q.matrix.out_features, q.matrix.out_features + k.matrix.out_features)
    return NativeLayer(
        input_norm=norm_of(layer.input_layernorm.weight, layer.input_layernorm.eps),
        qkv=group_by_input((q, k, v), columns),
        o_proj=LinearGroup.of((o,), (0,)),
        mlp_norm=norm_of(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps),
        gate_up=LinearGroup.of((gate, up), (0, 0)),
        down_proj=LinearGroup.of((down,), (0,)),
    )


def _head(model: LlamaForCausalLM, first: NativeLinear) -> NativeHead:
    norm, head = norm_of(model.norm.weight, model.norm.eps), model.lm_head
    if isinstance(head, nn.Module):
        linear = _native(head, "lm_head")
        return NativeHead(norm, linear.matrix, linear.inputs)
    inputs = LinearInput(head.shape[1], None, None, 0, first.activation_bits)
    return NativeHead(norm, pack_dense(first.runtime, head.detach()), inputs)


def _native(linear: nn.Module, path: str) -> NativeLinear:
    if not isinstance(linear, LowRankLinear):
        raise Unfused(f"{path} is not quantized")
    if not isinstance(linear.prepared, NativeLinear):
        raise Unfused(_other_backend(path, linear.selection))
    return linear.prepared


def _other_backend(path: str, selection: Selection) -> str:
    reason = dict(selection.passed_over).get(NativeBackend.name, "it was asked for")
    return f"{path} runs on the backend {selection.backend.name} ({reason})"
