"""Number formats: of one weight matrix, of its low-rank factors, and of the activations that meet them."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, with_config

from .errors import SchemeError

PER_CHANNEL = -1
SCALE_BITS = 16
EXPONENT_BITS = 8

WeightFormat = Literal["int", "mxint", "mxfp4", "nf4"]
ExponentRule = Literal["floor", "ceil"]
GROUP_SIZES: dict[WeightFormat, tuple[int, ...]] = {
    "int": (PER_CHANNEL, 16, 32, 64, 96, 128, 192, 256),
    "mxint": (16, 32),
    "mxfp4": (32,),
    "nf4": (32, 64, 128),
}
STRICT = ConfigDict(extra="forbid")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Number format of one weight matrix.

    num_bits:     2..8; always 4 for ``mxfp4`` and ``nf4``
    group_size:   consecutive input channels that share a scale; -1: the whole row (per output channel)
    is_symmetric: codes are centred on ``2**(num_bits - 1)`` and no zero point is stored; always true unless ``int``
    format:       ``int``: uniform steps, float16 scales. ``mxint``: the same with a power of two for a scale (block
        floating point). ``mxfp4``: E2M1 values under a power of two (OCP Microscaling 1.0). ``nf4``: the sixteen
        quantiles of a normal distribution (QLoRA, arXiv 2305.14314), float16 scales
    exponent:     of ``mxint``: the shared exponent is ``floor(log2(absmax))`` (QERA, arXiv 2410.06040) or
        ``ceil(log2(absmax))`` (LQER, arXiv 2402.02446); they differ where absmax is a power of two
    """

    num_bits: int = 4
    group_size: int = 64
    is_symmetric: bool = False
    format: WeightFormat = "int"
    exponent: ExponentRule = "floor"

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise SchemeError(f"num_bits is {self.num_bits}; choose 2 to 8")
        if self.format in {"mxfp4", "nf4"} and self.num_bits != 4:
            raise SchemeError(f"num_bits is {self.num_bits}, but {self.format} has 4: leave it out or choose 4")
        sizes = GROUP_SIZES[self.format]
        if self.group_size not in sizes:
            per_row = " (-1: one scale per row)" if PER_CHANNEL in sizes else ""
            raise SchemeError(f"group_size is {self.group_size}; for {self.format} choose one of {sizes}{per_row}")
        if self.format != "int":
            object.__setattr__(self, "is_symmetric", True)

    @property
    def max_code(self) -> int:
        """Largest stored code: codes run from 0 to ``2**num_bits - 1``."""
        return (1 << self.num_bits) - 1

    @property
    def scale_bits(self) -> int:
        """Stored bits of one scale: float16, or the exponent of a power of two."""
        return EXPONENT_BITS if self.has_exponent_scale else SCALE_BITS

    @property
    def has_exponent_scale(self) -> bool:
        """Scales are powers of two, of which the artifact stores the exponents."""
        return self.format in {"mxint", "mxfp4"}

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
            sizes = GROUP_SIZES[self.format]
            fitting = [size for size in sizes if size == PER_CHANNEL or in_features % size == 0]
            raise SchemeError(
                f"{where}: group_size {length} does not divide its {in_features} input channels; "
                f"choose one of {fitting}" + (" (-1: one scale per row)" if PER_CHANNEL in sizes else "")
            )

    def weight_bits(self, in_features: int) -> float:
        """Stored bits per weight: codes, scales and zero points."""
        zero_point_bits = 0 if self.is_symmetric else self.num_bits
        return self.num_bits + (self.scale_bits + zero_point_bits) / self.group_length(in_features)

    def __str__(self) -> str:
        """As tables name it: ``INT4 asymmetric, group 64``."""
        group = "per channel" if self.group_size == PER_CHANNEL else f"group {self.group_size}"
        symmetry = "" if self.format != "int" else " symmetric" if self.is_symmetric else " asymmetric"
        width = "" if self.format in {"mxfp4", "nf4"} else str(self.num_bits)
        return f"{self.format.upper()}{width}{symmetry}, {group}"


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""Module paths of the two matrices with one row per token."""

_VOCABULARY_GROUP_SIZES = (64, 32, PER_CHANNEL)


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class VocabularyScheme:
    """Number formats of the matrices with one row per token of the vocabulary: output head and embedding.

    A tied head with its embedding, both of 8 bits, stays one matrix. Any other quantized head of a tied network is
    stored beside the embedding.

    head_bits:      16: as the checkpoint has it, narrowed to 16 bits; 8, 4: symmetric integers in groups of 64
    embedding_bits: 16, 8: the same; single rows are dequantized as tokens ask for them
    """

    head_bits: int = 16
    embedding_bits: int = 16

    def __post_init__(self) -> None:
        if self.head_bits not in (16, 8, 4):
            raise SchemeError(f"head_bits is {self.head_bits}; choose 16, 8 or 4")
        if self.embedding_bits not in (16, 8):
            raise SchemeError(f"embedding_bits is {self.embedding_bits}; choose 16 or 8")

    def quantized(self, *, is_tied: bool) -> tuple[str, ...]:
        """Module paths of the matrices that are stored as codes; one path where both are the same matrix.

        Raises:
            SchemeError: an 8-bit embedding beside a tied head of 16 bits, which would only be larger than the two as
                one.
        """
        has_embedding, has_head = self.embedding_bits < 16, self.head_bits < 16
        if is_tied and has_embedding and not has_head:
            raise SchemeError(
                "the head is tied to the embedding: embedding_bits 8 beside head_bits 16 would store both, in more "
                "bytes than neither quantized takes; choose head_bits 8 or 4 as well"
            )
        is_shared = is_tied and self.head_bits == self.embedding_bits
        chosen = ((EMBEDDING, has_embedding), (HEAD, has_head and not is_shared))
        return tuple(path for path, is_quantized in chosen if is_quantized)

    def scheme(self, path: str, hidden_size: int) -> QuantScheme:
        """The format of the quantized matrix ``path``: groups of 64, where they do not tile a row of 32, or one."""
        size = next(it for it in _VOCABULARY_GROUP_SIZES if it == PER_CHANNEL or hidden_size % it == 0)
        return QuantScheme(self.head_bits if path == HEAD else self.embedding_bits, size, is_symmetric=True)


PER_TOKEN = -1
ActivationFormat = Literal["int", "mxint", "mxfp4"]
ACTIVATION_GROUP_SIZES: dict[ActivationFormat, tuple[int, ...]] = {
    "int": (PER_TOKEN, 32, 64, 96, 128, 192, 256),
    "mxint": (16, 32),
    "mxfp4": (32,),
}


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """Dynamic quantization of the input of a linear layer or of attention: each token chooses its grid by its values.

    num_bits:     2..8; always 4 for ``mxfp4``
    group_size:   consecutive channels of a token that share a scale; -1: the whole token
    is_symmetric: the grid is centred on zero; always true unless ``int``
    format, exponent: as in ``QuantScheme``; scales of ``int`` are float32, they are never stored
    clip_ratio:   of ``int``: the grid spans this share of the range of the token or group, and values outside it take
        the grid's ends; above 0, 1 is the whole range
    """

    num_bits: int = 8
    group_size: int = PER_TOKEN
    is_symmetric: bool = False
    format: ActivationFormat = "int"
    exponent: ExponentRule = "floor"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise SchemeError(f"activation num_bits is {self.num_bits}; choose 2 to 8")
        if self.format == "mxfp4" and self.num_bits != 4:
            raise SchemeError(f"activation num_bits is {self.num_bits}, but mxfp4 has 4: choose 4")
        sizes = ACTIVATION_GROUP_SIZES[self.format]
        if self.group_size not in sizes:
            raise SchemeError(
                f"activation group_size is {self.group_size}; for {self.format} choose one of {sizes}"
                + (" (-1: one scale per token)" if PER_TOKEN in sizes else "")
            )
        if not 0 < self.clip_ratio <= 1:
            raise SchemeError(f"activation clip_ratio is {self.clip_ratio}; choose above 0, up to 1")
        if self.format != "int":
            if self.clip_ratio != 1:
                raise SchemeError(
                    f"activation clip_ratio is {self.clip_ratio}, but a scale of {self.format} is a power of two: "
                    "leave it out, or choose format int"
                )
            object.__setattr__(self, "is_symmetric", True)

    def fitting_group_sizes(self, num_channels: int) -> list[int]:
        """Group sizes of the format that tile ``num_channels``."""
        sizes = ACTIVATION_GROUP_SIZES[self.format]
        return [size for size in sizes if size == PER_TOKEN or num_channels % size == 0]

    def check(self, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when the groups do not tile ``in_features`` channels."""
        fitting = self.fitting_group_sizes(in_features)
        if self.group_size not in fitting:
            raise SchemeError(
                f"{where}: activation group_size {self.group_size} does not divide its {in_features} input channels; "
                f"choose one of {fitting}"
            )

    def __str__(self) -> str:
        """As tables name it: ``INT8 asymmetric, per token``, ``INT4 symmetric, group 64, clip ratio 0.9``."""
        group = "per token" if self.group_size == PER_TOKEN else f"group {self.group_size}"
        symmetry = "" if self.format != "int" else " symmetric" if self.is_symmetric else " asymmetric"
        width = "" if self.format == "mxfp4" else str(self.num_bits)
        clip = "" if self.clip_ratio == 1 else f", clip ratio {self.clip_ratio:g}"
        return f"{self.format.upper()}{width}{symmetry}, {group}{clip}"
