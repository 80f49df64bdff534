"""Networks of known shapes with random weights, built in memory: speed does not depend on what the weights are."""

from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from ..errors import QerveError
from ..kernels.native.embedding import EmbeddingTable
from ..kernels.native.inputs import ActivationBits, LinearInput
from ..kernels.native.pack import WIDE_BLOCK, CodedMatrix, PackedMatrix, pack_linear, pack_matrix
from ..kernels.native.program import Norm
from ..kernels.native.runtime import Runtime
from ..llama.config import LlamaConfig
from ..llama.native_layers import LinearGroup, NativeHead, NativeLayer
from ..llama.native_programs import NativeWeights
from ..scheme import QuantScheme
from ..types import Correction, LinearWeights, QuantizedWeight

_COMMON = LlamaConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
SHAPES = {
    "tinyllama-1.1b": _COMMON,
    "llama-2-7b": replace(
        _COMMON,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
}
"""By name, as published."""

_SCHEME = QuantScheme(num_bits=4, group_size=64, is_symmetric=True)
_SCALE = 0.01
_HEAD_BITS = 8
_FACTOR_BYTES = 1.1


def weight_bytes(config: LlamaConfig, rank: int) -> int:
    """About what the packed weights of a network take: 4 bits in groups of 64, 8-bit factors, embedding and head."""
    shapes = config.linear_shapes().values()
    codes = (
        sum(shape.in_features * shape.out_features for shape in shapes) * _SCHEME.weight_bits(_SCHEME.group_size) / 8
    )
    factors = sum(shape.in_features + shape.out_features for shape in shapes) * rank * _FACTOR_BYTES
    return int(codes + factors + 2 * _FACTOR_BYTES * config.vocab_size * config.hidden_size)


def check_memory(num_bytes: int, what: str, available: int | None = None) -> None:
    """Refuse what does not fit.

    Args:
        num_bytes: bytes needed.
        what: what for, in the message.
        available: bytes that are there; None: asks the system.

    Raises:
        QerveError: it does not fit into the memory that is free.
    """
    available = psutil.virtual_memory().available if available is None else available
    if num_bytes > available:
        raise QerveError(f"{what} takes about {num_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free")


def random_weights(
    config: LlamaConfig,
    rank: int,
    bits: ActivationBits,
    runtime: Runtime,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NativeWeights:
    """Weights of the shape ``config``: W4 in groups of 64, low-rank terms of ``rank``, head and embedding of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for index in range(config.num_hidden_layers):
        progress(index, config.num_hidden_layers)
        matrices = {
            path.rsplit(".", 1)[1].removesuffix("_proj"): _linear(
                shape.out_features, shape.in_features, rank, runtime, generator
            )
            for path, shape in config.layer_linear_shapes(index).items()
        }
        layers.append(_layer(config, matrices, bits))
    progress(config.num_hidden_layers, config.num_hidden_layers)
    groups = config.hidden_size // WIDE_BLOCK
    rows = _bytes(config.vocab_size, config.hidden_size, generator)
    scale = torch.full((config.vocab_size, groups), _SCALE)
    table = EmbeddingTable(rows.view(torch.int8), scale)
    head = pack_matrix(runtime, CodedMatrix(rows, config.hidden_size, _HEAD_BITS, scale), WIDE_BLOCK)
    return NativeWeights(
        config, table, tuple(layers), NativeHead(_norm(config), head, _input(config.hidden_size, bits))
    )


def _layer(config: LlamaConfig, matrices: dict[str, PackedMatrix], bits: ActivationBits) -> NativeLayer:
    def group(names: str, columns: tuple[int, ...] = (0,)) -> LinearGroup:
        members = tuple(matrices[name] for name in names.split())
        return LinearGroup(members, _input(members[0].in_features, bits), columns)

    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return NativeLayer(
        input_norm=_norm(config),
        qkv=(group("q k v", (0, heads, heads + kv_heads)),),
        o_proj=group("o"),
        mlp_norm=_norm(config),
        gate_up=group("gate up", (0, 0)),
        down_proj=group("down"),
    )


def _linear(
    out_features: int, in_features: int, rank: int, runtime: Runtime, generator: torch.Generator
) -> PackedMatrix:
    codes = _bytes(out_features, in_features, generator).bitwise_and_(_SCHEME.max_code)
    scale = torch.full((out_features, _SCHEME.num_groups(in_features)), _SCALE, dtype=torch.float16)
    correction = None
    if rank:
        up = torch.randn(out_features, rank, generator=generator).mul_(_SCALE)
        correction = Correction(up, torch.randn(rank, in_features, generator=generator).mul_(_SCALE))
    return pack_linear(runtime, LinearWeights(QuantizedWeight(codes, scale, None, _SCHEME), correction), WIDE_BLOCK)


def _bytes(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.uint8).random_(0, 256, generator=generator)


def _norm(config: LlamaConfig) -> Norm:
    return Norm(torch.ones(config.hidden_size), config.rms_norm_eps)


def _input(in_features: int, bits: ActivationBits) -> LinearInput:
    return LinearInput(in_features, None, None, 0, bits)
