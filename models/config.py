"""What a build is asked to do: frozen dataclasses, read from TOML or JSON and written back unchanged."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import tomli_w
from pydantic import with_config

from .errors import SchemeError
from .plain import from_plain, read_plain
from .scheme import STRICT, ActivationScheme, QuantScheme, VocabularyScheme

FactorDtype = Literal["bfloat16", "float16", "float32", "int8", "int4", "mxint8", "mxint6", "mxint4"]
Option: TypeAlias = bool | int | float | str


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class QuantizerConfig:
    """The base quantizer: how codes are chosen.

    method:          ``rtn`` rounds to nearest, ``gptq`` lets later input channels make up for the rounding of earlier
        ones (arXiv 2210.17323)
    use_clip_search: the grid of each group is the one with the least output error, not the one that spans the group
    use_act_order:   gptq takes input channels in the order of falling mean square, with the grids fixed beforehand
    damping:         gptq adds this share of the mean diagonal to the diagonal of its Hessian
    """

    method: Literal["rtn", "gptq"] = "rtn"
    use_clip_search: bool = False
    use_act_order: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise SchemeError(f"quantizer damping is {self.damping}; choose 0 to 1")
        if self.use_act_order and self.method != "gptq":
            raise SchemeError("use_act_order is an option of quantizer gptq; choose that method or leave it out")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ReconstructConfig:
    """Which reconstruction method corrects the quantization error, and how large the correction is.

    factor_dtype: how the factors are stored; ``int8`` has one scale per rank, ``int4`` and the ``mxint`` ones have
        groups of 32 along the features
    refit:        the correction is fitted once more by reduced-rank regression to the outputs of the dense layer from
        the quantized inputs
    options:      of the method, by name
    """

    method: str = "qera-exact"
    rank: int = 32
    factor_dtype: FactorDtype = "bfloat16"
    refit: bool = False
    options: dict[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise SchemeError(f"rank is {self.rank}; choose 0 (no correction) or more")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class TransformConfig:
    """Rewrites of the network that leave its function as it is and make its weights and activations easier to quantize.

    flatten:        divide each input channel by its largest magnitude to this power (and multiply it by the weight's to
        1 minus it), folded into the layer before: SmoothQuant (arXiv 2211.10438), with 1 SERQ's; None: not at all
    permute:        order the hidden channels of the MLP by the size of the activations, folded into gate, up and down
    rotation:       ``online``: a Hadamard transform of every linear layer's input while serving. ``offline``: of the
        residual stream and the value heads, folded into the weights (QuaRot, arXiv 2404.00456), and online only
        before down_proj; a tied head is untied
    rotation_block: width of the Hadamard blocks; 0: the whole width, where it has a known Hadamard matrix
    """

    flatten: float | None = None
    permute: bool = False
    rotation: Literal["none", "online", "offline"] = "none"
    rotation_block: int = 0

    def __post_init__(self) -> None:
        if self.flatten is not None and not 0 <= self.flatten <= 1:
            raise SchemeError(f"transform flatten is {self.flatten}; choose 0 to 1")
        if self.rotation_block < 0 or self.rotation_block & (self.rotation_block - 1):
            raise SchemeError(
                f"rotation_block is {self.rotation_block}; choose a power of two, or 0 for the whole width"
            )
        if self.rotation == "offline" and self.flatten is not None:
            raise SchemeError("flatten with rotation offline: folding the scales undoes the rotation; use one of them")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """Where the calibration tokens come from and how statistics are taken.

    source: ``self`` (text which the model itself writes, seeded), a path (.txt, .jsonl, .json of token ids,
        .safetensors with ``token_ids``), or ``hf:DATASET[:CONFIG][:SPLIT]`` (downloaded when online)
    inputs: ``quantized``: each layer sees what the quantized layers before it produce; ``sequential``: each linear
        layer does, those before it in the same decoder layer included (four passes instead of one); ``dense``: what
        the dense ones produce
    num_holdout: sequences kept apart from the statistics, on which the build measures perplexity
    num_gradient_sequences: sequences of which gradients are taken, where something needs them
    shrinkage: share of the correlations between input channels that quantizers and methods do not see: few tokens
        exaggerate them; not in the papers
    """

    source: str = "self"
    num_sequences: int = 128
    sequence_length: int = 2048
    batch_size: int = 2
    num_holdout: int = 4
    inputs: Literal["quantized", "sequential", "dense"] = "quantized"
    num_gradient_sequences: int = 8
    seed: int = 0
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "num_sequences": 1, "sequence_length": 2, "batch_size": 1, "num_holdout": 0, "num_gradient_sequences": 1
        }  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise SchemeError(f"calibration {name} is {getattr(self, name)}; choose {smallest} or more")
        if not 0 <= self.shrinkage <= 1:
            raise SchemeError(f"calibration shrinkage is {self.shrinkage}; choose a share from 0 to 1")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What one linear layer has of its own, in place of the build's; None: as the build."""

    num_bits: int | None = None
    group_size: int | None = None
    rank: int | None = None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """Bits and rank of each linear layer chosen so that all of them together take ``target_bits`` per weight.

    target_bits: effective bits per weight over the linear layers: codes, scales, zero points and factors
    num_bits:    widths to choose from
    max_rank:    largest rank to choose; 0: widths only
    """

    target_bits: float
    num_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    max_rank: int = 64

    def __post_init__(self) -> None:
        if not self.num_bits or not all(2 <= width <= 8 for width in self.num_bits):
            raise SchemeError(f"budget num_bits are {list(self.num_bits)}; choose widths from 2 to 8")
        if self.max_rank < 0:
            raise SchemeError(f"budget max_rank is {self.max_rank}; choose 0 or more")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How a method that trains (``qer``) goes through the calibration set; others take no notice.

    num_epochs:          times that every decoder layer sees the calibration set; a step takes one batch
    num_blocks:          consecutive decoder layers that are trained together
    learning_rate:       of the factors: of integer ones in units of one; 0: what suits the merge
    scale_learning_rate: of the logarithms of the scales
    clip_learning_rate:  of the clip ratios of quantized activations
    rounding_penalty:    weight of the error that rounding the factors makes, reached at the end of the training
    overflow_penalty:    weight of what the clamp of the merge cuts off
    num_checks:          times that the loss is measured on the same batches; the best state so far is kept, the start
        included
    num_check_batches:   batches that it is measured on
    precision:           of matrix products with activations; the integers are exact in either
    use_checkpointing:   recompute activations on the way back instead of keeping them
    end_to_end_epochs:   passes over the calibration set in which the scales of the whole quantized network learn to
        reproduce the dense network's logits, after the layers; 0: none
    end_to_end_learning_rate: of the logarithms of the scales there
    """

    num_epochs: int = 1
    num_blocks: int = 1
    learning_rate: float = 0.0
    scale_learning_rate: float = 2e-3
    clip_learning_rate: float = 5e-3
    rounding_penalty: float = 0.1
    overflow_penalty: float = 0.1
    num_checks: int = 4
    num_check_batches: int = 8
    precision: Literal["float32", "bfloat16"] = "float32"
    use_checkpointing: bool = False
    end_to_end_epochs: int = 0
    end_to_end_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_blocks", "num_checks", "num_check_batches"):
            if getattr(self, name) < 1:
                raise SchemeError(f"training {name} is {getattr(self, name)}; choose 1 or more")
        rates = [name for name in self.__slots__ if name.endswith(("_rate", "_penalty", "_epochs"))]
        for name in rates:
            if not 0 <= getattr(self, name) < float("inf"):
                raise SchemeError(f"training {name} is {getattr(self, name)}; choose 0 or more")


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class BuildConfig:
    """Everything that decides the bytes of an artifact, apart from the checkpoint itself.

    activations: how the inputs of linear layers are quantized while serving; None: not at all
    attention:   how queries, keys (both after rotary positions) and values are quantized before the attention products,
        each token on its own; None: not at all. Softmax probabilities stay as they are. Groups of head_dim channels
        leave each head a grid of its own: QLLM's setting (arXiv 2310.08041); -1: one for all heads of a token
    objective:   what the codes stand in for. ``weight``: the dense weight. ``output``: the weight which, from the
        inputs of the quantized network, comes closest to what the dense network's layer puts out (GPTAQ's objective,
        arXiv 2504.02692)
    vocabulary:  number formats of embedding and output head, which ``scheme`` does not apply to
    budget:      None: the scheme and rank below for every layer
    layers:      exceptions, by the module path of the linear layer
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)
    activations: ActivationScheme | None = None
    attention: ActivationScheme | None = None
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    objective: Literal["weight", "output"] = "weight"
    budget: BudgetConfig | None = None
    layers: dict[str, LayerConfig] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    vocabulary: VocabularyScheme = field(default_factory=VocabularyScheme)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object, where: str = "configuration") -> Self:
        """Validate ``values``.

        Raises:
            SchemeError: an unknown key, a wrong type or a value out of range, with its place in ``where``.
        """
        return from_plain(cls, values, where)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``path`` (.toml or .json).

        Raises:
            SchemeError: the file is missing, not well formed, or does not validate.
        """
        return cls.from_dict(read_plain(path), str(path))

    def write(self, path: Path) -> None:
        """Write ``path`` (.toml or .json); ``read`` gives back an equal object."""
        values = self.to_dict()
        is_toml = path.suffix == ".toml"
        text = tomli_w.dumps(_without_none(values)) if is_toml else json.dumps(values, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: what is None is left out, and read back as the default, which is None."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
