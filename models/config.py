"""What a build is asked to do: frozen dataclasses, read from TOML or JSON and written back unchanged."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from .errors import SchemeError

PER_CHANNEL = -1
GROUP_SIZES = (PER_CHANNEL, 32, 64, 128)
SCALE_BITS = 16

FactorDtype = Literal["bfloat16", "float16", "float32"]
_STRICT = ConfigDict(extra="forbid")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Uniform integer format of one weight matrix.

    num_bits:     2..8
    group_size:   consecutive input channels that share a scale; -1: the whole row (per output channel)
    is_symmetric: codes are centred on ``2**(num_bits - 1)`` and no zero point is stored
    """

    num_bits: int = 4
    group_size: int = 64
    is_symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise SchemeError(f"num_bits is {self.num_bits}; choose 2 to 8")
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(f"group_size is {self.group_size}; choose one of {GROUP_SIZES} (-1: one scale per row)")

    @property
    def max_code(self) -> int:
        """Largest stored code: codes run from 0 to ``2**num_bits - 1``."""
        return (1 << self.num_bits) - 1

    def group_length(self, in_features: int) -> int:
        """Input channels per scale in a row of ``in_features``."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Scales per row of ``in_features``."""
        return in_features // self.group_length(in_features)

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when the groups do not tile a row of ``in_features``."""
        length = self.group_length(in_features)
        if in_features % length:
            fitting = [size for size in GROUP_SIZES if size == PER_CHANNEL or in_features % size == 0]
            raise SchemeError(
                f"{where}: group_size {length} does not divide its {in_features} input channels; "
                f"choose one of {fitting} (-1: one scale per row)"
            )

    def weight_bits(self, in_features: int) -> float:
        """Stored bits per weight: codes, scales and zero points."""
        zero_point_bits = 0 if self.is_symmetric else self.num_bits
        return self.num_bits + (SCALE_BITS + zero_point_bits) / self.group_length(in_features)


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class ReconstructConfig:
    """Which reconstruction method corrects the quantization error, and how large the correction is."""

    method: str = "qera-exact"
    rank: int = 32
    factor_dtype: FactorDtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise SchemeError(f"rank is {self.rank}; choose 0 (no correction) or more")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Where the calibration tokens come from and how statistics are taken.

    source: ``self`` (text which the model itself writes, seeded), a path (.txt, .jsonl, .json of token ids,
        .safetensors with ``token_ids``), or ``hf:DATASET[:CONFIG][:SPLIT]`` (downloaded when online)
    inputs: ``quantized``: each layer sees what the quantized layers before it produce; ``dense``: what the
        dense ones produce
    num_holdout: sequences kept apart from the statistics, on which the build measures perplexity
    """

    source: str = "self"
    num_sequences: int = 128
    sequence_length: int = 2048
    batch_size: int = 2
    num_holdout: int = 4
    inputs: Literal["quantized", "dense"] = "quantized"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_sequences", 1), ("sequence_length", 2), ("batch_size", 1), ("num_holdout", 0)):
            if getattr(self, name) < least:
                raise SchemeError(f"calibration {name} is {getattr(self, name)}; choose {least} or more")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class BuildConfig:
    """Everything that decides the bytes of an artifact, apart from the checkpoint itself."""

    scheme: QuantScheme = field(default_factory=QuantScheme)
    quantizer: str = "rtn"
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: JSON and TOML can both write it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object, where: str = "configuration") -> Self:
        """Validate ``values``.

        Raises:
            SchemeError: an unknown key, a wrong type or a value out of range, with its place in ``where``.
        """
        try:
            # As JSON, because strict validation takes a dict for a dataclass only there.
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except SchemeError as error:
            raise SchemeError(f"{where}: {error}") from error
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors())
            raise SchemeError(f"{where}: {problems}") from error
        except (TypeError, ValueError) as error:
            raise SchemeError(f"{where}: holds a value that is not plain data: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``path`` (.toml or .json).

        Raises:
            SchemeError: the file is missing, not well formed, or does not validate.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError) as error:
            raise SchemeError(f"{path}: cannot be read as a build configuration: {error}") from error
        return cls.from_dict(values, str(path))

    def write(self, path: Path) -> None:
        """Write ``path`` (.toml or .json); ``read`` gives back an equal object."""
        values = self.to_dict()
        text = tomli_w.dumps(values) if path.suffix == ".toml" else json.dumps(values, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
