"""What an artifact will take, before it exists: bytes on disk by component, memory to serve it, memory to build it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..artifact.format import Component
from ..artifact.layout import layer_shapes, rest_shapes
from ..budget import Choice, stored_bits
from ..config import BuildConfig
from ..device import default_dtype
from ..kernels import AUTO, get_backends
from ..kernels.native.backend import NativeBackend
from ..kernels.native.embedding import EmbeddingTable
from ..kernels.native.pack import dense_nbytes
from ..layers.linear import LowRankLinear
from ..llama.checkpoint import Checkpoint
from ..llama.config import LinearShape, LlamaConfig
from ..llama.fuse import obstacle_of
from ..llama.kv_cache import PagedKVCache
from ..quant.factors import store_factors
from ..quant.packing import packed_columns
from ..reconstruct import get_reconstructor
from ..reconstruct.serq import Serq
from ..scheme import EMBEDDING, HEAD
from ..types import LinearWeights, QuantizedWeight
from .recipe import has_target_stream, rotation_block, sequences_together

_MATRIX_BYTES = 2
_ROW_TILE = 64
_KV_TOKENS = 1024


def component_bytes(checkpoint: Checkpoint, config: BuildConfig, choices: Mapping[str, Choice]) -> dict[Component, int]:
    """Stored bytes by component, as a manifest gives them; ``choices`` per linear layer."""
    shapes = checkpoint.config.linear_shapes()
    has_single_factor = isinstance(get_reconstructor(config.reconstruct), Serq)
    sizes: Counter[Component] = Counter()
    for path, choice in choices.items():
        shape, scheme = shapes[path], choice.scheme
        rows, columns = shape.out_features, shape.in_features
        num_groups = scheme.num_groups(columns)
        sizes["packed"] += rows * packed_columns(columns, scheme.num_bits)
        sizes["scale"] += rows * num_groups * scheme.scale_bits // 8
        if not scheme.is_symmetric:
            sizes["zero_point"] += num_groups * packed_columns(rows, scheme.num_bits)
        sizes["unquantized"] += 4 * rows * shape.has_bias
        if choice.rank:
            _add_factors(sizes, config, shape, choice.rank, has_single_factor=has_single_factor)
    sizes["unquantized"] += unquantized_bytes(checkpoint, config)
    for path, kind in _vocabulary_kinds(checkpoint.config, config).items():
        component: Component = "head" if path == HEAD else "embedding"
        sizes[component] += round(kind.choice.stored_bits / 8)
    return dict(sizes)


def _add_factors(
    sizes: Counter[Component], config: BuildConfig, shape: LinearShape, rank: int, *, has_single_factor: bool
) -> None:
    factor_dtype = config.reconstruct.factor_dtype
    if has_single_factor:
        sizes["lora_up"] += _factor_bytes(config, shape, rank, has_single_factor=True)
        sizes["unquantized"] += 4 * shape.in_features  # the order in which channels are gathered
        return
    total = _factor_bytes(config, shape, rank)
    # Each factor of a transposed pair is like the other one with its own length.
    square = LinearShape(shape.out_features, shape.out_features, has_bias=False)
    scheme = config.scheme
    of_square = stored_bits(scheme, square, rank, factor_dtype) - stored_bits(scheme, square, 0, factor_dtype)
    sizes["lora_up"] += round(of_square / 16)
    sizes["lora_down"] += total - round(of_square / 16)


def _factor_bytes(config: BuildConfig, shape: LinearShape, rank: int, *, has_single_factor: bool = False) -> int:
    factor_dtype, scheme = config.reconstruct.factor_dtype, config.scheme
    with_factors = stored_bits(scheme, shape, rank, factor_dtype, has_single_factor=has_single_factor)
    return round((with_factors - stored_bits(scheme, shape, 0, factor_dtype)) / 8)


def unquantized_bytes(checkpoint: Checkpoint, config: BuildConfig) -> int:
    """Embedding, head and norms as an artifact stores them unquantized: matrices at 16 bits, vectors as they are."""
    network = checkpoint.config.with_vocabulary(config.vocabulary)
    names = dict(rest_shapes(network))
    for index in range(network.num_hidden_layers):
        names |= layer_shapes(network, index)
    # Every gain is as long as the hidden state; the first one tells how they are stored.
    gain_bytes = checkpoint.tensor("model.norm.weight").element_size()
    return sum(
        shape[0] * gain_bytes if len(shape) == 1 else shape[0] * shape[1] * _MATRIX_BYTES for shape in names.values()
    )


def resident_bytes(dense: LlamaConfig, config: BuildConfig, choices: Mapping[str, Choice], device: torch.device) -> int:
    """Weights as they are kept while serving on ``device``, by the backends that would run the layers, and the rest.

    dense: shape of the network, whether or not it says that embedding and head are quantized
    """
    shapes, dtype = dense.linear_shapes(), default_dtype(device)
    kinds_of = {
        path: _Kind(shapes[path], choice, rotation_block(config, path, shapes[path].in_features))
        for path, choice in choices.items()
    }
    kinds = Counter(kinds_of.values())
    total = sum(number * _layer_bytes(kind, config, device) for kind, number in kinds.items())
    network = dense.with_vocabulary(config.vocabulary)
    if _is_fused(network, kinds, config, device):
        shared = sum(
            4 * shapes[path].in_features for path in choices if _shares_channel_order(path, kinds_of[path], config)
        )
        return total - shared + _fused_rest_bytes(dense, network, config, device)
    total += _vocabulary_resident_bytes(dense, config, device)
    for shape in network.unquantized_shapes().values():
        total += math.prod(shape) * (_MATRIX_BYTES if len(shape) > 1 else dtype.itemsize)
    return total


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells layers apart that take different memory."""

    shape: LinearShape
    choice: Choice
    rotation_block: int

    def weights(self, num_rows: int, config: BuildConfig) -> LinearWeights:
        """A layer of this kind with ``num_rows`` output channels; its values do not matter."""
        scheme, num_columns, rank = self.choice.scheme, self.shape.in_features, self.choice.rank
        num_groups = scheme.num_groups(num_columns)
        scale = torch.ones(num_rows, num_groups, dtype=torch.bfloat16 if scheme.has_exponent_scale else torch.float16)
        zero_point = None if scheme.is_symmetric else torch.zeros(num_rows, num_groups, dtype=torch.uint8)
        codes = torch.zeros(num_rows, num_columns, dtype=torch.uint8)
        correction, order = None, None
        if rank:
            has_single_factor = isinstance(get_reconstructor(config.reconstruct), Serq)
            lora_down = None if has_single_factor else torch.ones(rank, num_columns)
            correction = store_factors(torch.ones(num_rows, rank), lora_down, config.reconstruct.factor_dtype)
            order = torch.arange(num_columns, dtype=torch.int32).flip(0) if has_single_factor else None
        return LinearWeights(
            QuantizedWeight(codes, scale, zero_point, scheme),
            correction,
            channel_order=order,
            rotation_block=self.rotation_block,
            activations=config.activations,
            bias=torch.zeros(num_rows) if self.shape.has_bias else None,
        )


def _vocabulary_kinds(dense: LlamaConfig, config: BuildConfig) -> dict[str, _Kind]:
    """Embedding and head by module path, as far as they are quantized."""
    kinds = {}
    for path, shape in dense.with_vocabulary(config.vocabulary).vocabulary_shapes().items():
        scheme = config.vocabulary.scheme(path, shape.in_features)
        bits = scheme.weight_bits(shape.in_features) * shape.out_features * shape.in_features
        kinds[path] = _Kind(shape, Choice(scheme, 0, bits), 0)
    return kinds


def _vocabulary_resident_bytes(dense: LlamaConfig, config: BuildConfig, device: torch.device) -> int:
    """Quantized embedding and head as they are kept: one for both only where the head's backend gives single rows."""
    kinds, plain = _vocabulary_kinds(dense, config), replace(config, activations=None)
    is_shared = dense.tie_word_embeddings and HEAD not in kinds
    total = 0
    for path, kind in kinds.items():
        if path == HEAD or is_shared:
            total += _layer_bytes(kind, plain, device)
        if path == EMBEDDING and not (is_shared and _prepared(kind, 2 * _ROW_TILE, plain, device).has_rows):
            total += _layer_bytes(kind, plain, device, "reference")
    return total


def _is_fused(network: LlamaConfig, kinds: Iterable[_Kind], config: BuildConfig, device: torch.device) -> bool:
    """Served as one list of native operators."""
    if obstacle_of(network.with_attention(config.attention), {}) is not None:
        return False
    prepared = (_prepared(kind, 2 * _ROW_TILE, config, device) for kind in kinds)
    return all(layer.selection.backend.name == NativeBackend.name for layer in prepared)


def _shares_channel_order(path: str, kind: _Kind, config: BuildConfig) -> bool:
    """A layer in channel order whose input another layer reads before it: both keep one order."""
    has_order = bool(kind.choice.rank) and isinstance(get_reconstructor(config.reconstruct), Serq)
    return has_order and path.endswith(("k_proj", "v_proj", "up_proj"))


def _fused_rest_bytes(dense: LlamaConfig, network: LlamaConfig, config: BuildConfig, device: torch.device) -> int:
    """Norms, embedding and head as the native kernels read them."""
    kinds, plain = _vocabulary_kinds(dense, config), replace(config, activations=None)
    gains = sum(math.prod(shape) for shape in network.unquantized_shapes().values() if len(shape) == 1)
    total = gains * torch.float32.itemsize
    num_rows, width = network.vocab_size, network.hidden_size
    if EMBEDDING in kinds:
        total += EmbeddingTable.of(kinds[EMBEDDING].weights(1, plain).quantized).nbytes * num_rows
    else:
        total += num_rows * width * _MATRIX_BYTES
    if network.is_head_quantized:
        return total + _layer_bytes(kinds.get(HEAD) or kinds[EMBEDDING], plain, device)
    return total + dense_nbytes(num_rows, width)


def _prepared(
    kind: _Kind, num_rows: int, config: BuildConfig, device: torch.device, backend: str = AUTO
) -> LowRankLinear:
    weights, dtype = kind.weights(num_rows, config), default_dtype(device)
    return LowRankLinear.of(weights, get_backends(backend), device=device, dtype=dtype, where="a planned layer")


def _layer_bytes(kind: _Kind, config: BuildConfig, device: torch.device, backend: str = AUTO) -> int:
    """What the backend for layers of this kind keeps: asked for two narrow ones, it grows evenly with the rows."""

    def measured(num_rows: int) -> int:
        return _prepared(kind, num_rows, config, device, backend).nbytes

    num_rows = kind.shape.out_features
    # As many rows beyond a whole tile as the layer has: backends differ in which numbers of rows they take.
    fewer = num_rows % _ROW_TILE + 2 * _ROW_TILE
    more = fewer + 2 * _ROW_TILE
    if num_rows <= more:
        return measured(num_rows)
    small, large = measured(fewer), measured(more)
    return small + (large - small) * (num_rows - fewer) // (more - fewer)


def kv_cache_bytes(network: LlamaConfig, device: torch.device) -> int:
    """Keys and values of 1024 tokens while serving on ``device``."""
    return PagedKVCache.bytes_per_block(network, _KV_TOKENS, default_dtype(device))


def memory_bound_bytes(network: LlamaConfig, num_inside: int, hidden_bytes: int) -> int:
    """Dense embedding, one dense decoder layer, and the calibration set's activations, all in float32.

    Args:
        network: its shape.
        num_inside: tokens of the one batch that is inside a layer, with its attention and MLP intermediates.
        hidden_bytes: hidden states of every sequence.
    """
    linears = network.layer_linear_shapes(0).values()
    embedding = network.vocab_size * network.hidden_size
    layer = sum(shape.out_features * shape.in_features for shape in linears)
    per_token = sum(shape.out_features for shape in linears) + 4 * network.hidden_size
    return 4 * (embedding + layer + num_inside * per_token) + hidden_bytes


def num_tokens_inside(config: BuildConfig) -> int:
    """Tokens that are inside a layer at a time while nothing is trained."""
    calibration = config.calibration
    return min(sequences_together(config), calibration.num_sequences) * calibration.sequence_length


def hidden_bytes(network: LlamaConfig, config: BuildConfig) -> int:
    """Hidden states of the whole calibration set, in every stream that a build takes through the network."""
    calibration = config.calibration
    if calibration.source == "none":
        return 0
    num_holdouts = 3 if config.vocabulary.embedding_bits < 16 else 2
    num_inputs = calibration.num_sequences * (2 if has_target_stream(config) else 1)
    num_sequences = num_inputs + num_holdouts * calibration.num_holdout
    return 4 * num_sequences * calibration.sequence_length * network.hidden_size


def build_memory_bytes(network: LlamaConfig, config: BuildConfig) -> int:
    """What a build holds at most: ``BuildReport.memory_bound_bytes``, from the configuration alone."""
    num_inside = 0 if config.calibration.source == "none" else num_tokens_inside(config)
    return memory_bound_bytes(network, num_inside, hidden_bytes(network, config))
