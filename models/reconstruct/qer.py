"""QER: low-rank parameters of the base's own bit width, trained, then merged into the base's integers.

QER (CloudCom 2025) is published as an abstract: what it states is the bit width, the merge without dequantization or
requantization, the two errors that remain (of the parameters' rounding, of overflow in the merge) and a training that
takes them into account, on 128 samples for one epoch. The rest is ours; ``merge.py`` has the arithmetic. Its relatives
are members of one family, told apart by ``QerOptions.merge``:

    fixed-point      integer factors on a base that keeps fraction bits until the merge; the default on RTN
    shift, direct    integer factors on the codes themselves, with and without a shift
    ternary          factors of -1, 0, 1 and a threshold (LoTA-QAF, arXiv 2505.18724), without its offset of zero points
    inside-rounding  float factors inside the rounding (LR-QAT, arXiv 2406.06385)
    requantize       float factors added to the quantized weight in training, to the dense one before it is quantized
        again: the usual way, whose deployed weight is not the trained one (error correction of QLLM, arXiv 2310.08041)
    none             no factors: scales and clips alone are trained; a control, and the default on GPTQ

The method itself makes the base; the training takes whole decoder layers and is part of the pipeline.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import with_config
from torch import Tensor

from ..config import ReconstructConfig
from ..errors import SchemeError
from ..scheme import STRICT, QuantScheme
from ..types import InputStatistics, LinearWeights, QuantizeFn, Statistic
from .merge import check_exact
from .options import parse_options

Merge = Literal["fixed-point", "shift", "direct", "ternary", "inside-rounding", "requantize", "none"]

INTEGER_MERGES = frozenset({"fixed-point", "shift", "direct", "ternary"})
AUTOMATIC = -1
_FINEST_SHIFT = 30


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class QerOptions:
    """Options of method ``qer``.

    merge:          the member of the family; a build that names none takes ``default_merge``
    shift:          t: a step of the product of the factors moves a weight by ``2^-t`` of a level; -1: so that the
        largest product moves it by four to eight levels, but with steps no coarser than the fraction's; in merge
        ``shift`` by one to two
    fraction_bits:  f, bits below the codes that the base of ``fixed-point`` keeps until the merge
    factor_bits:    of the integer factors; 0: as many as the base has
    threshold:      of ``ternary``, as a share of the largest product
    initialization: of integer factors. ``random``: one factor random, the other zero. ``qera``: from QERA-exact's
        factors of what rounding left over, switched off in the output channels that they do not improve
    use_scales:     train the scales too
    use_clips:      train the clip ratios of quantized activations too
    """

    merge: Merge = "fixed-point"
    shift: int = AUTOMATIC
    fraction_bits: int = 4
    factor_bits: int = 0
    threshold: float = 0.75
    initialization: Literal["random", "qera"] = "random"
    use_scales: bool = True
    use_clips: bool = True

    def __post_init__(self) -> None:
        if not AUTOMATIC <= self.shift <= _FINEST_SHIFT:
            raise SchemeError(f"qer shift is {self.shift}; choose 0 to {_FINEST_SHIFT}, or -1 to have it chosen")
        if not 1 <= self.fraction_bits <= 8:
            raise SchemeError(f"qer fraction_bits is {self.fraction_bits}; choose 1 to 8")
        if self.factor_bits not in {0, 2, 3, 4, 5, 6, 7, 8}:
            raise SchemeError(f"qer factor_bits is {self.factor_bits}; choose 2 to 8, or 0 for the base's width")
        if self.initialization == "qera" and self.merge not in {"fixed-point", "shift", "direct"}:
            raise SchemeError(f"qer initialization qera is of merges fixed-point, shift and direct, not {self.merge}")
        if self.merge == "direct" and self.shift > 0:
            raise SchemeError(
                f"qer shift is {self.shift}, but merge direct has none; leave it out, or choose merge shift"
            )
        if not 0 < self.threshold < 1:
            raise SchemeError(f"qer threshold is {self.threshold}; choose a share between 0 and 1")

    def largest_factor(self, num_bits: int) -> int:
        """Q: integer factors lie in -Q .. Q; ``num_bits`` is the base's width."""
        return 1 if self.merge == "ternary" else (1 << ((self.factor_bits or num_bits) - 1)) - 1

    def shift_of(self, rank: int, num_bits: int) -> int:
        """t, chosen where it is to be."""
        if self.shift != AUTOMATIC:
            return self.shift
        if self.merge == "direct":
            return 0
        largest = max(1, rank * self.largest_factor(num_bits) ** 2).bit_length() - 1
        return largest if self.merge == "shift" else max(self.fraction_bits, largest - 2)


def default_merge(quantizer: str) -> Merge:
    """The strongest member of the family on a base of ``quantizer``.

    GPTQ's codes make up for each other's rounding errors. A step of one of them undoes that, and a product of low rank
    takes many at once: on such a base no form of factors reached what scales alone do (docs/decisions/0012).
    """
    return "none" if quantizer == "gptq" else "fixed-point"


class Qer:
    """Quantizes; the pipeline's training then replaces codes, scales and clip ratios by better ones."""

    method: ClassVar[str] = "qer"

    def __init__(self, config: ReconstructConfig) -> None:
        self.options = parse_options(config, QerOptions)
        self.rank = config.rank
        self.requires = frozenset({Statistic.MEAN_SQUARE})
        if self.options.initialization == "qera":
            self.requires |= {Statistic.AUTOCORRELATION}
        if config.refit:
            raise SchemeError("method qer leaves no correction to refit; leave refit out")
        if self.rank == 0 and self.options.merge != "none":
            raise SchemeError("method qer needs a rank of 1 or more; merge=none trains scales and clips alone")

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when its weight cannot have factors of this rank."""
        if self.options.merge == "none":
            return
        largest = min(out_features, in_features)
        if self.rank > largest:
            raise SchemeError(
                f"{where}: rank {self.rank} is above the smaller dimension of its {out_features} x {in_features} "
                f"weight; choose at most {largest}"
            )

    def check_scheme(self, scheme: QuantScheme, where: str) -> None:
        """Raise SchemeError, naming the layer ``where``, when nothing merges into weights of ``scheme`` exactly."""
        if scheme.format != "int":
            raise SchemeError(
                f"{where}: method qer merges into the codes of integer grids, and {scheme.format} is another format; "
                "choose format int"
            )
        options = self.options
        if options.merge in INTEGER_MERGES:
            shift = options.shift_of(self.rank, scheme.num_bits)
            left_shift = max(0, options.fraction_bits - shift) if options.merge == "fixed-point" else 0
            check_exact(self.rank, options.largest_factor(scheme.num_bits), where, left_shift=left_shift)

    def channel_order(self, weight: Tensor, statistics: InputStatistics) -> Tensor | None:
        """None: the order of the input channels does not matter."""
        return None

    def reconstruct(self, weight: Tensor, statistics: InputStatistics, quantize: QuantizeFn) -> LinearWeights:
        """The base: codes of ``weight`` (out_features, in_features), without a correction."""
        return LinearWeights(quantize(weight))
