"""What a manifest and an index say, derived from what is stored: the writer writes it, the reader compares it."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ..config import BuildConfig
from ..errors import ArtifactError
from ..llama.config import LlamaConfig
from ..quant.factors import FLOAT_FACTORS
from .format import (
    CONFIG_FILE,
    FILE_NAME_PATTERN,
    FORMAT,
    GENERATION_CONFIG_FILE,
    PICKLE_SUFFIXES,
    RESERVED_FILES,
    Component,
    FileRecord,
    Manifest,
    Probe,
    TensorName,
    TensorRecord,
    qerve_version,
    self_hash,
    shard_name,
)
from .jsonio import first_problem, readable_json
from .layout import ExpectedTensor, StoredTensor, TensorError, expected_layer, expected_rest
from .record import LinearRecord, Record

DENSE_BYTES_PER_PARAMETER = 2
_ONLY_WHERE_QUANTIZED = frozenset(("embedding", "head"))


class ShardProgress(Record):
    """A finished shard: its record, those of its tensors, and those of its linear layers.

    Those of the last shard are embedding and head, as far as they are quantized.
    """

    file: FileRecord
    tensors: dict[TensorName, TensorRecord]
    linears: dict[TensorName, LinearRecord]


def expected_tensors(
    config: LlamaConfig, linears: Mapping[str, LinearRecord], vocabulary: Mapping[str, LinearRecord]
) -> dict[str, ExpectedTensor]:
    """Every tensor of an artifact by name.

    Raises:
        TensorError: the records are not those of the network's linear layers and of its quantized embedding and head,
            or differ from their shapes.
    """
    expected = expected_rest(config, vocabulary)
    remaining = dict(linears)
    for layer_index in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer_index}."
        records = {path: remaining.pop(path) for path in linears if path.startswith(prefix)}
        expected |= expected_layer(config, layer_index, records)
    if remaining:
        raise TensorError(repr(min(remaining)), "this record does not belong here")
    return expected


def component_bytes(
    tensors: Mapping[str, TensorRecord], expected: Mapping[str, ExpectedTensor]
) -> dict[Component, int]:
    """Stored bytes by component; all but ``embedding`` and ``head`` are present whether or not they are used."""
    totals: dict[Component, int] = {name: 0 for name in get_args(Component) if name not in _ONLY_WHERE_QUANTIZED}
    for name, spec in expected.items():
        num_bytes = StoredTensor(tensors[name].dtype, tensors[name].shape).num_bytes
        totals[spec.component] = totals.get(spec.component, 0) + num_bytes
    return totals


def record_bits(record: LinearRecord) -> float:
    """Effective bits of one linear layer as its record implies them: ``LinearWeights.effective_bits``."""
    bits = record.scheme.weight_bits(record.in_features)
    if record.factor_dtype is not None:
        dtype = FLOAT_FACTORS.get(record.factor_dtype)
        itemsize = 0 if dtype is None else dtype.itemsize
        factors = sum(factor.num_stored_bits(itemsize) for factor in record.factors.values())
        bits += factors / (record.out_features * record.in_features)
    return bits


def effective_bits(linears: Mapping[str, LinearRecord]) -> float:
    """Stored bits per weight over all linear layers."""
    num_weights = sum(record.in_features * record.out_features for record in linears.values())
    bits = math.fsum(record.effective_bits * record.in_features * record.out_features for record in linears.values())
    return bits / num_weights


def dense_bytes(config: LlamaConfig) -> int:
    """What all parameters of the checkpoint take at 16 bits; a tied head counts once."""
    return DENSE_BYTES_PER_PARAMETER * config.num_parameters


def plain_files(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Content by file name.

    Raises:
        ArtifactError: a tokenizer file's name is taken or stands for pickled data, or a value that JSON cannot hold.
    """
    for name in tokenizer_files:
        is_plain = re.fullmatch(FILE_NAME_PATTERN, name) is not None and name not in RESERVED_FILES
        if not is_plain or Path(name).suffix.lower() in PICKLE_SUFFIXES | {".safetensors"}:
            raise ArtifactError(f"tokenizer file {name!r}: this name cannot be part of an artifact; leave the file out")
    contents = dict(tokenizer_files)
    for name, values in ((CONFIG_FILE, hf_config), (GENERATION_CONFIG_FILE, generation_config)):
        try:
            contents[name] = readable_json(values)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{name}: cannot be written as JSON: {error}; correct it in the checkpoint") from error
    return contents


def index_bytes(tensors: Mapping[str, TensorRecord]) -> bytes:
    """Content of the index, spelled as Hugging Face does."""
    total = sum(StoredTensor(record.dtype, record.shape).num_bytes for record in tensors.values())
    weight_map = {name: record.file for name, record in tensors.items()}
    return readable_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def build_manifest(
    config: LlamaConfig,
    shards: Sequence[ShardProgress],
    files: Mapping[str, FileRecord],
    *,
    build: BuildConfig,
    checkpoint_fingerprint: str,
    calibration_fingerprint: str | None,
    evaluation: Mapping[str, int | float],
    probe: Probe | None = None,
) -> Manifest:
    """The manifest of the finished ``shards`` (in order) and the other ``files``.

    Raises:
        ArtifactError: an evaluation result that is not finite, or a value outside the format.
    """
    for name, value in evaluation.items():
        if not math.isfinite(value):
            raise ArtifactError(f"evaluation: {name} is {value}: the quantized network is broken; give it more bits")
    tensors = {name: record for shard in shards for name, record in shard.tensors.items()}
    linears = {path: record for shard in shards[:-1] for path, record in shard.linears.items()}
    vocabulary = shards[-1].linears
    shard_files = {shard_name(index, len(shards)): shard.file for index, shard in enumerate(shards)}
    values: dict[str, Any] = {
        "format": FORMAT,
        "qerve_version": qerve_version(),
        "build": build,
        "checkpoint_fingerprint": checkpoint_fingerprint,
        "calibration_fingerprint": calibration_fingerprint,
        "linears": linears,
        "vocabulary": vocabulary,
        "tensors": tensors,
        "files": {**files, **shard_files},
        "component_bytes": component_bytes(tensors, expected_tensors(config, linears, vocabulary)),
        "effective_bits": effective_bits(linears),
        "dense_bytes": dense_bytes(config),
        "evaluation": dict(evaluation),
        "probe": probe,
        "manifest_sha256": "0" * 64,
    }
    try:
        draft = Manifest(**values)
    except ValidationError as error:
        raise ArtifactError(f"the manifest cannot be written: {first_problem(error)}") from error
    return draft.model_copy(update={"manifest_sha256": self_hash(draft.model_dump(mode="json"))})
