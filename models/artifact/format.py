"""Format `qerve-1`: file names, tensor names and the manifest.

    NAME/
      quantization.json                 the manifest: records, sizes, sha256 of every other file and of every tensor
      config.json generation_config.json tokenizer.json ...      as Hugging Face spells them
      model.safetensors.index.json      tensor -> shard, as Hugging Face spells it
      model-00001-of-000NN.safetensors  decoder layer 0
      ...
      model-000NN-of-000NN.safetensors  the rest: embeddings, final norm, head

One shard per decoder layer: a build writes a layer once, for good, and can go on after the last finished one.

Tensors of a linear layer, named by its Hugging Face module path and one of

    weight_packed      uint8 (out_features, ceil(in_features * num_bits / 8)): codes, a little-endian bit stream along
                       in_features, lowest element in the lowest bits
    weight_scale       float16 (out_features, num_groups)
    weight_zero_point  uint8 (num_groups, ceil(out_features * num_bits / 8)): zero points at num_bits each, packed as
                       the codes are but along out_features, which a byte divides even with one group per row
    lora_up            (out_features, rank), lora_down (rank, in_features): bfloat16, float16 or float32
    input_scale        (in_features,), channel_order int32 (in_features,), bias (out_features,)

Every other tensor keeps its Hugging Face name and the floating-point type it was given in.
Equal inputs give equal bytes: no times, no paths, sorted keys.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ..config import BuildConfig, FactorDtype, QuantScheme
from ..errors import ArtifactError, SchemeError
from ..types import LinearWeights
from .jsonio import canonical_json, tabular_json

FORMAT = "qerve-1"
MANIFEST_FILE = "quantization.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
RESERVED_FILES = frozenset((MANIFEST_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE))
PICKLE_SUFFIXES = frozenset((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))

MAX_JSON_BYTES = 64 << 20
"""Upper bound of the manifest and of each configuration or tokenizer file; the largest known tokenizer takes 35 MB."""

FILE_NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"
"""No separators, nothing hidden: a name can lead nowhere but into the directory."""

FileName = Annotated[str, StringConstraints(pattern=f"^{FILE_NAME_PATTERN}$")]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", max_length=300)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
DtypeName = Literal["F32", "F16", "BF16", "I32", "U8"]
LoraForm = Literal["none", "two-factor", "single-factor"]
Component = Literal["packed", "scale", "zero_point", "lora_up", "lora_down", "unquantized"]

FACTOR_DTYPES: dict[torch.dtype, FactorDtype] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


class Record(BaseModel):
    """Base of everything in the manifest: immutable, no unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


def _located(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Let pydantic say in which record a scheme is impossible: it adds the place to a ValueError only."""
    try:
        return handler(value)
    except SchemeError as error:
        raise ValueError(str(error)) from error


class LinearRecord(Record):
    """What one quantized linear layer consists of, and how well it stands for the dense one.

    lora_form:             ``single-factor``: no lora_down, the correction reads the first ``rank`` channels (SERQ)
    relative_weight_error: ``|W - W'| / |W|`` (Frobenius) with W' the quantized weight and its correction
    relative_output_error: the same of the layer's outputs over the calibration inputs; None: not calibrated
    effective_bits:        stored bits per weight, as ``LinearWeights.effective_bits``
    """

    scheme: Annotated[QuantScheme, WrapValidator(_located)]
    in_features: Size
    out_features: Size
    rank: Count
    lora_form: LoraForm
    factor_dtype: FactorDtype | None
    has_bias: bool
    has_input_scale: bool
    has_channel_order: bool
    relative_weight_error: Annotated[float, Field(ge=0)]
    relative_output_error: Annotated[float, Field(ge=0)] | None
    effective_bits: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.in_features % self.scheme.group_length(self.in_features):
            raise ValueError(f"groups of {self.scheme.group_size} do not divide {self.in_features} input channels")
        if (self.rank == 0) != (self.lora_form == "none") or (self.rank == 0) != (self.factor_dtype is None):
            raise ValueError(f"rank {self.rank}, form {self.lora_form} and type {self.factor_dtype} contradict")
        return self

    @classmethod
    def of(
        cls, weights: LinearWeights, relative_weight_error: float, relative_output_error: float | None = None
    ) -> Self:
        """The record of ``weights``. A correction of rank 0 is no correction.

        Raises:
            ArtifactError: the two factors differ in type, have one that the format does not store, or an error is not
                a finite number.
        """
        quantized, correction = weights.quantized, weights.correction
        rank = 0 if correction is None else correction.rank
        form: LoraForm = "none"
        factor_dtype: FactorDtype | None = None
        if correction is not None and rank > 0:
            form = "single-factor" if correction.lora_down is None else "two-factor"
            dtypes = {factor.dtype for factor in (correction.lora_up, correction.lora_down) if factor is not None}
            if len(dtypes) > 1 or not dtypes <= FACTOR_DTYPES.keys():
                names = sorted(map(str, dtypes))
                raise ArtifactError(
                    f"low-rank factors of type {names}: give both one of {sorted(FACTOR_DTYPES.values())}"
                )
            factor_dtype = FACTOR_DTYPES[dtypes.pop()]
        values: dict[str, Any] = {
            "scheme": quantized.scheme,
            "in_features": quantized.in_features,
            "out_features": quantized.out_features,
            "rank": rank,
            "lora_form": form,
            "factor_dtype": factor_dtype,
            "has_bias": weights.bias is not None,
            "has_input_scale": weights.input_scale is not None,
            "has_channel_order": weights.channel_order is not None,
            "relative_weight_error": relative_weight_error,
            "relative_output_error": relative_output_error,
            "effective_bits": weights.effective_bits,
        }
        try:
            return cls(**values)
        except ValidationError as error:
            raise ArtifactError(f"a linear layer cannot be recorded: {first_problem(error)}") from error


class Manifest(Record):
    """``quantization.json``: what the artifact is, how it was made, and what vouches for every byte of it.

    linears:         per module path; this is the build's per-layer report
    tensors:         per tensor name
    files:           per file name, all but this one
    component_bytes: stored bytes by component; biases, input scales and channel orders count as ``unquantized``
    effective_bits:  stored bits per weight over all linear layers
    dense_bytes:     what all parameters of the checkpoint take at 16 bits
    evaluation:      what the build measured, e.g. dense and quantized perplexity
    manifest_sha256: of the canonical JSON of all the other fields
    """

    format: Literal["qerve-1"]
    qerve_version: str
    build: Annotated[BuildConfig, WrapValidator(_located)]
    checkpoint_fingerprint: str
    calibration_fingerprint: str | None
    linears: dict[TensorName, LinearRecord]
    tensors: dict[TensorName, TensorRecord]
    files: dict[FileName, FileRecord]
    component_bytes: dict[Component, Count]
    effective_bits: Annotated[float, Field(gt=0)]
    dense_bytes: Count
    evaluation: dict[str, int | float]
    manifest_sha256: Sha256

    @property
    def artifact_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.num_bytes for record in self.files.values())

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files that are neither configuration, index nor shard."""
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


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings in one line: its place, spelled safely, and what is wrong."""
    finding = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, finding['loc']))!r}: {finding['msg']}"


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
