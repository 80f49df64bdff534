"""Which tensors an artifact holds: names, shapes, types and shards, as the configuration and the records imply them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..config import FactorDtype
from ..errors import ArtifactError
from ..llama.config import LinearShape, LlamaConfig
from ..quant.factors import FLOAT_FACTORS
from ..quant.packing import packed_columns
from ..scheme import HEAD, QuantScheme
from .factors import FactorShape
from .format import Component, DtypeName, shard_name
from .record import LinearRecord

DTYPES: dict[DtypeName, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS: frozenset[DtypeName] = frozenset(("F32", "F16", "BF16"))
U8: frozenset[DtypeName] = frozenset(("U8",))


class TensorError(ArtifactError):
    """Something is wrong with a tensor; whoever knows the file and the remedy catches this and says them.

    tensor: its name, None when the problem is not that of one tensor
    """

    def __init__(self, tensor: str | None, problem: str) -> None:
        super().__init__(problem if tensor is None else f"tensor {tensor}: {problem}")
        self.tensor = tensor
        self.problem = problem


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """What one tensor must be; ``dtypes`` are the types it may have."""

    shape: tuple[int, ...]
    dtypes: frozenset[DtypeName]
    file: str
    component: Component


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What one tensor is."""

    dtype: DtypeName
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        num_bytes = DTYPES[self.dtype].itemsize
        for length in self.shape:
            num_bytes *= length
        return num_bytes


def layer_shapes(config: LlamaConfig, layer_index: int) -> dict[str, tuple[int, ...]]:
    """Unquantized tensors of one decoder layer by name: its norms."""
    prefix = f"model.layers.{layer_index}."
    return {name: shape for name, shape in config.unquantized_shapes().items() if name.startswith(prefix)}


def rest_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Unquantized tensors by name that belong to no decoder layer: embedding, final norm, head unless it is tied."""
    return {name: shape for name, shape in config.unquantized_shapes().items() if not name.startswith("model.layers.")}


def expected_layer(
    config: LlamaConfig, layer_index: int, records: Mapping[str, LinearRecord]
) -> dict[str, ExpectedTensor]:
    """Tensors of one decoder layer's shard by name; ``records`` of its linear layers only.

    Raises:
        TensorError: the records are not those of the layer's linears, or differ from their shapes.
    """
    file = shard_name(layer_index, config.num_hidden_layers + 1)
    shapes = config.layer_linear_shapes(layer_index)
    check_names(records.keys(), shapes.keys(), "record")
    expected: dict[str, ExpectedTensor] = {}
    for path, shape in shapes.items():
        record = records[path]
        _check_shape(path, record, shape)
        if shape.has_bias and not record.has_bias:
            raise TensorError(path, "recorded without a bias, but the network needs one")
        expected |= expected_linear(path, record, file)
    return expected | _expected_unquantized(layer_shapes(config, layer_index), file)


def expected_rest(config: LlamaConfig, records: Mapping[str, LinearRecord]) -> dict[str, ExpectedTensor]:
    """Tensors of the last shard by name; ``records`` of a quantized embedding and head.

    Raises:
        TensorError: the records are not those that ``config`` lists, differ from their shapes, or hold more than codes.
    """
    file = shard_name(config.num_hidden_layers, config.num_hidden_layers + 1)
    shapes = config.vocabulary_shapes()
    check_names(records.keys(), shapes.keys(), "record")
    expected = _expected_unquantized(rest_shapes(config), file)
    for path, shape in shapes.items():
        _check_shape(path, records[path], shape)
        _check_codes_only(path, records[path])
        component: Component = "head" if path == HEAD else "embedding"
        tensors = expected_linear(path, records[path], file)
        expected |= {name: replace(spec, component=component) for name, spec in tensors.items()}
    return expected


def _check_shape(path: str, record: LinearRecord, shape: LinearShape) -> None:
    found, needed = (record.out_features, record.in_features), (shape.out_features, shape.in_features)
    if found != needed:
        raise TensorError(path, f"recorded as a {found} matrix, but the network needs {needed}")


def _check_codes_only(path: str, record: LinearRecord) -> None:
    parts = {
        "a correction": record.rank > 0,
        "a bias": record.has_bias,
        "an input scale": record.has_input_scale,
        "a channel order": record.has_channel_order,
        "a rotation": record.rotation_block > 0,
        "quantized inputs": record.activations is not None,
    }
    for name, is_there in parts.items():
        if is_there:
            raise TensorError(path, f"recorded with {name}, which embedding and head do not have")


def expected_linear(path: str, record: LinearRecord, file: str) -> dict[str, ExpectedTensor]:
    """Tensors of the linear layer ``path`` by name."""
    rows, columns, scheme = record.out_features, record.in_features, record.scheme
    bits, groups = scheme.num_bits, scheme.num_groups(columns)

    def tensor(shape: tuple[int, ...], dtypes: frozenset[DtypeName], component: Component) -> ExpectedTensor:
        return ExpectedTensor(shape, dtypes, file, component)

    tensors = {
        "weight_packed": tensor((rows, packed_columns(columns, bits)), U8, "packed"),
        "weight_scale": tensor((rows, groups), _scale_dtypes(scheme), "scale"),
    }
    if not scheme.is_symmetric:
        tensors["weight_zero_point"] = tensor((groups, packed_columns(rows, bits)), U8, "zero_point")
    for name, factor in record.factors.items():
        for part, (shape, dtypes) in _expected_factor(factor, record.factor_dtype).items():
            tensors[f"{name}{part}"] = tensor(shape, dtypes, "lora_up" if name == "lora_up" else "lora_down")
    if record.has_input_scale:
        tensors["input_scale"] = tensor((columns,), FLOATS, "unquantized")
    if record.has_channel_order:
        tensors["channel_order"] = tensor((columns,), frozenset(("I32",)), "unquantized")
    if record.has_bias:
        tensors["bias"] = tensor((rows,), FLOATS, "unquantized")
    return {f"{path}.{name}": spec for name, spec in tensors.items()}


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, ExpectedTensor]) -> None:
    """Compare what is there with what must be there.

    Raises:
        TensorError: a tensor is missing, is one too many, or has another shape or type.
    """
    check_names(stored.keys(), expected.keys(), "tensor")
    for name, spec in expected.items():
        found = stored[name]
        if found.shape != spec.shape:
            raise TensorError(name, f"shape {found.shape}, but {spec.shape} is needed")
        if found.dtype not in spec.dtypes:
            raise TensorError(name, f"type {found.dtype}, but {' or '.join(sorted(spec.dtypes))} is needed")


def check_names(found: Iterable[str], expected: Iterable[str], kind: str) -> None:
    """Compare two sets of names.

    Raises:
        TensorError: one is missing or too many; of several, the first in alphabetical order.
    """
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if missing:
        raise TensorError(min(missing), f"this {kind} is missing")
    if extra:
        raise TensorError(repr(min(extra)), f"this {kind} does not belong here")


def _expected_factor(
    factor: FactorShape, factor_dtype: FactorDtype | None
) -> dict[str, tuple[tuple[int, int], frozenset[DtypeName]]]:
    """Shape and types of a factor's tensors, by what is appended to its name."""
    scheme = factor.scheme
    if scheme is None:
        dtypes = frozenset(DTYPE_NAMES[dtype] for name, dtype in FLOAT_FACTORS.items() if name == factor_dtype)
        return {"": ((factor.rows, factor.columns), dtypes)}
    return {
        "_packed": ((factor.rows, packed_columns(factor.columns, scheme.num_bits)), U8),
        "_scale": ((factor.rows, scheme.num_groups(factor.columns)), _scale_dtypes(scheme)),
    }


def _scale_dtypes(scheme: QuantScheme) -> frozenset[DtypeName]:
    return U8 if scheme.has_exponent_scale else frozenset(("F16",))


def _expected_unquantized(shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, ExpectedTensor]:
    return {name: ExpectedTensor(tuple(shape), FLOATS, file, "unquantized") for name, shape in shapes.items()}
