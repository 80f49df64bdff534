"""Format `qerve-1`: file names, tensor names and the manifest.

    NAME/
      quantization.json                 the manifest: records, sizes, sha256 of every other file and of every tensor
      report.html                       how it was built, for people; optional
      config.json generation_config.json tokenizer.json ...      as Hugging Face spells them
      model.safetensors.index.json      tensor -> shard, as Hugging Face spells it
      model-00001-of-000NN.safetensors  decoder layer 0
      ...
      model-000NN-of-000NN.safetensors  the rest: embeddings, final norm, head

One shard per decoder layer: a build writes a layer once, for good, and can go on after the last finished one.

Tensors of a linear layer, named by its Hugging Face module path and one of

    weight_packed      uint8 (out_features, ceil(in_features * num_bits / 8)): codes, a little-endian bit stream along
                       in_features, lowest element in the lowest bits
    weight_scale       (out_features, num_groups): float16, or for powers of two their exponents as uint8 e, for
                       2**(e - 127) (E8M0 of OCP Microscaling, 1 to 254)
    weight_zero_point  uint8 (num_groups, ceil(out_features * num_bits / 8)): zero points at num_bits each, packed as
                       the codes are but along out_features, which a byte divides even with one group per row
    lora_up            (out_features, rank), lora_down (rank, in_features): bfloat16, float16 or float32. Quantized ones
                       are lora_up_packed, lora_up_scale, lora_down_packed and lora_down_scale, as the weight is,
                       lora_up as (rank, out_features) unless it stands alone
    input_scale        (in_features,), channel_order int32 (in_features,), bias (out_features,)

A quantized output head (``lm_head``) is stored like a linear layer, and so is a quantized embedding
(``model.embed_tokens``), whose rows are those of the vocabulary. Both have weight_packed and weight_scale only. Where a
tied head has the embedding's 8 bits, the embedding's codes are the head's too and are stored once.

Every other tensor keeps its Hugging Face name and the floating-point type it was given in.
Equal inputs give equal bytes: no times, no paths, sorted keys.

The name of the format changes when what is stored changes its meaning. What is added has a default that stands for its
absence, as ``vocabulary`` has in the manifest: artifacts from before are read as they are, and a reader from before
refuses what it does not know.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from ..config import BuildConfig
from .jsonio import canonical_json, tabular_json
from .record import Count, LinearRecord, Record, Size

FORMAT = "qerve-1"
MANIFEST_FILE = "quantization.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "report.html"
RESERVED_FILES = frozenset((MANIFEST_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, REPORT_FILE))
PICKLE_SUFFIXES = frozenset((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))

MAX_JSON_BYTES = 64 << 20
"""Upper bound of every file but the shards; the largest known tokenizer takes 35 MB."""

FILE_NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"
"""No separators, nothing hidden: a name can lead nowhere but into the directory."""

FileName = Annotated[str, StringConstraints(pattern=f"^{FILE_NAME_PATTERN}$")]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", max_length=300)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
DtypeName = Literal["F32", "F16", "BF16", "I32", "U8"]
Component = Literal["packed", "scale", "zero_point", "lora_up", "lora_down", "unquantized", "embedding", "head"]


class FileRecord(Record):
    """Size and hash of one file."""

    num_bytes: Count
    sha256: Sha256


class TensorRecord(Record):
    """Where one tensor is stored, its type, shape and the hash of its bytes."""

    file: FileName
    dtype: DtypeName
    shape: tuple[Size, ...]
    sha256: Sha256


class Probe(Record):
    """The beginning of the holdout, with what the build measured on it: a loaded artifact can be checked against it.

    token_ids:     what is fed, from a sequence's first token on
    dense_nll:     nats per token of the dense network, over all tokens but the first
    quantized_nll: of the quantized one
    """

    token_ids: Annotated[tuple[Count, ...], Field(min_length=2, max_length=4096)]
    dense_nll: Annotated[float, Field(ge=0)]
    quantized_nll: Annotated[float, Field(ge=0)]


class Manifest(Record):
    """``quantization.json``: what the artifact is, how it was made, and what vouches for every byte of it.

    Reading one raises SchemeError, beside pydantic's error, when ``build`` asks for what cannot be.

    linears:         per module path; this is the build's per-layer report
    vocabulary:      the same of embedding and output head, as far as they are quantized
    tensors:         per tensor name
    files:           per file name, all but this one
    component_bytes: stored bytes by component; biases, input scales and channel orders count as ``unquantized``;
        ``embedding`` and ``head`` are there where quantized, codes and scales together
    effective_bits:  stored bits per weight over all of ``linears``
    dense_bytes:     what all parameters of the checkpoint take at 16 bits
    evaluation:      what the build measured, e.g. dense and quantized perplexity
    probe:           a text to check it by once it is loaded; None: the build had no holdout
    manifest_sha256: of the canonical JSON of all the other fields
    """

    format: Literal["qerve-1"]
    qerve_version: str
    build: BuildConfig
    checkpoint_fingerprint: str
    calibration_fingerprint: str | None
    linears: dict[TensorName, LinearRecord]
    vocabulary: dict[TensorName, LinearRecord] = Field(default_factory=dict)
    tensors: dict[TensorName, TensorRecord]
    files: dict[FileName, FileRecord]
    component_bytes: dict[Component, Count]
    effective_bits: Annotated[float, Field(gt=0)]
    dense_bytes: Count
    evaluation: dict[str, int | float]
    probe: Probe | None = None
    manifest_sha256: Sha256

    @property
    def artifact_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.num_bytes for record in self.files.values())

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files that are neither configuration, index, report nor shard."""
        return tuple(sorted(self.files.keys() - RESERVED_FILES - set(self.shards)))

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards, in network order."""
        return tuple(sorted(name for name in self.files if name.endswith(".safetensors")))

    def tensors_by_file(self) -> dict[str, dict[str, TensorRecord]]:
        """Tensors by name, of each shard."""
        shards: dict[str, dict[str, TensorRecord]] = {name: {} for name in self.shards}
        for name, record in self.tensors.items():
            shards[record.file][name] = record
        return shards

    def to_bytes(self) -> bytes:
        """The file's content."""
        return tabular_json(self.model_dump(mode="json"))


def self_hash(values: dict[str, Any]) -> str:
    """Hash of a manifest in its JSON form, with or without its ``manifest_sha256`` field."""
    rest = {name: value for name, value in values.items() if name != "manifest_sha256"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def shard_name(shard_index: int, num_shards: int) -> str:
    """File name of a shard, counted from 0: decoder layers in order, then the rest."""
    return f"model-{shard_index + 1:05d}-of-{num_shards:05d}.safetensors"


def qerve_version() -> str:
    """Version of the installed distribution; ``0+source`` when it runs from a source tree that is not installed."""
    try:
        return version("qerve")
    except PackageNotFoundError:
        return "0+source"
