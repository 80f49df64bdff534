"""What a build is predicted to come to: the result of planning."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from ..artifact.format import Component
from ..config import LayerConfig


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One linear layer as it will be built.

    effective_bits: stored bits per weight: codes, scales, zero points and factors
    loss:           its share of the predicted loss, in the unit of the plan; None without calibration
    """

    num_bits: int
    group_size: int
    rank: int
    num_weights: int
    effective_bits: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build is predicted to come to.

    linears:            by module path
    effective_bits:     stored bits per weight over all linear layers
    component_bytes:    stored bytes by component, as the manifest will give them
    artifact_bytes:     of the artifact, without its manifest and index
    resident_bytes:     weights, embedding and norms in memory while serving
    kv_cache_bytes:     in addition, per 1024 tokens of context
    build_memory_bytes: what the build holds at most: embedding, one decoder layer, activations
    training_memory_bytes: what it holds on the device while it trains; None: nothing is trained
    gpu_memory_bytes:   what it holds on a GPU at most, by phase of the build, wherever this plan was made
    nll_increase:       nats per token above the dense network, to second order; None without gradients
    output_error:       mean over layers of the relative squared error of their outputs; None with gradients, or
        without calibration
    seconds:            what planning took
    own:                the configuration's exceptions that the plan was made under
    has_ranks:          ranks are planned too, and not left as configured
    """

    linears: dict[str, PlannedLayer]
    effective_bits: float
    component_bytes: dict[Component, int]
    artifact_bytes: int
    dense_bytes: int
    resident_bytes: int
    kv_cache_bytes: int
    build_memory_bytes: int
    training_memory_bytes: int | None = None
    gpu_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    nll_increase: float | None = None
    output_error: float | None = None
    seconds: float = 0.0
    own: Mapping[str, LayerConfig] = field(default_factory=dict, repr=False)
    has_ranks: bool = True

    @property
    def perplexity_ratio(self) -> float | None:
        """Predicted perplexity relative to that of the dense network; infinite when it does not fit a float."""
        if self.nll_increase is None:
            return None
        try:
            return math.exp(self.nll_increase)
        except OverflowError:
            return math.inf

    @property
    def layers(self) -> dict[str, LayerConfig]:
        """Bits and rank of every linear layer as ``BuildConfig.layers`` takes them."""
        return {
            path: replace(own, num_bits=layer.num_bits, rank=layer.rank if self.has_ranks else own.rank)
            for path, layer in self.linears.items()
            for own in (self.own.get(path, LayerConfig()),)
        }

    def to_dict(self) -> dict[str, object]:
        """Plain dict for JSON."""
        values = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in {"linears", "own", "has_ranks"}
        }
        linears = {path: asdict(layer) for path, layer in self.linears.items()}
        values["gpu_memory_bytes"] = dict(self.gpu_memory_bytes)
        return {**values, "perplexity_ratio": self.perplexity_ratio, "linears": linears}
