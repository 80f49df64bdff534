"""Rotary embedding settings, as the two generations of ``config.json`` spell them.

Older files have ``rope_theta`` and ``rope_scaling`` side by side; transformers 5 writes both into ``rope_parameters``.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import CheckpointError
from .config_fields import ConfigFields

RopeType = Literal["default", "linear", "dynamic", "llama3"]

DEFAULT_THETA = 10000.0
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    original_max_position_embeddings: context length before scaling; set for ``dynamic`` and ``llama3``
    """

    rope_type: RopeType = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None


def read_rope(fields: ConfigFields, max_position_embeddings: int) -> RopeConfig:
    """The rotary settings in a ``config.json``.

    Raises:
        CheckpointError: an unknown rope type, partial rotation, or settings that are missing or out of range.
    """
    scaling = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    where = f"{fields.where}: rope settings"
    if any(layer_type in scaling for layer_type in LAYER_TYPES):
        raise CheckpointError(f"{where}: different rotary embeddings per layer type are not supported")
    rope = ConfigFields(scaling, where)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.number("rope_theta", fields.number("rope_theta", DEFAULT_THETA))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{where}: rotating only a part of each head is not supported (partial_rotary_factor)")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    factor = rope.number("factor") if rope_type in get_args(RopeType) else 0.0
    if rope_type == "linear":
        return RopeConfig("linear", theta, factor)
    if rope_type == "dynamic":
        # transformers measures from the configured length, whatever else the settings say
        return RopeConfig("dynamic", theta, factor, original_max_position_embeddings=max_position_embeddings)
    if rope_type == "llama3":
        return _llama3(rope, fields, theta, max_position_embeddings)
    raise CheckpointError(f"{where}: rope type {rope_type!r} is not supported; {', '.join(get_args(RopeType))} are")


def _llama3(rope: ConfigFields, fields: ConfigFields, theta: float, max_position_embeddings: int) -> RopeConfig:
    original = rope.integer("original_max_position_embeddings", max_position_embeddings)
    config = RopeConfig(
        "llama3",
        theta,
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        fields.integer("original_max_position_embeddings", original),
    )
    if config.high_freq_factor <= config.low_freq_factor:
        raise CheckpointError(f"{rope.where}: high_freq_factor must be larger than low_freq_factor")
    return config
