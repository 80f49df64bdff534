"""Short words for a build configuration: ``INT4 g64, gptq, online Hadamard 64, qera-exact r16``."""

from collections.abc import Iterable, Mapping
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_METHODLESS = {"none"}


def in_network_order(projections: Iterable[str]) -> list[str]:
    """Names of projections, each once, as the network runs them; unknown ones last."""
    known = {name: place for place, name in enumerate(PROJECTIONS)}
    return sorted(set(projections), key=lambda name: (known.get(name, len(known)), name))


def recipe_label(config: Mapping[str, Any], *, with_rank: bool = True) -> str:
    """One line for ``config``, the plain dict of a ``BuildConfig``."""
    parts = [number_format(config.get("scheme") or {}), *_activations("A", config.get("activations"))]
    parts += _activations("QKV", config.get("attention"))
    parts += _quantizer(config.get("quantizer") or {}) + _transform(config.get("transform") or {})
    vocabulary = config.get("vocabulary") or {}
    parts += [
        f"{name} {bits} bits" for name in ("head", "embedding") if (bits := vocabulary.get(f"{name}_bits", 16)) < 16
    ]
    if config.get("objective") == "output":
        parts.append("output objective")
    if budget := config.get("budget"):
        parts.append(f"budget {budget['target_bits']:g} bits")
    return ", ".join([*parts, *_correction(config.get("reconstruct") or {}, with_rank)])


def method_label(config: Mapping[str, Any]) -> str:
    """Quantizer and correction without sizes: ``gptq + qera-exact``."""
    quantizer = (config.get("quantizer") or {}).get("method", "rtn")
    method = (config.get("reconstruct") or {}).get("method", "none")
    return str(quantizer) if method in _METHODLESS else f"{quantizer} + {method}"


def number_format(values: Mapping[str, Any]) -> str:
    """``INT4 g64``, ``MXINT4 g32``, ``NF4 g64``; of weights or activations, ``INT4 g64 clip 0.9``."""
    name = str(values.get("format", "int")).upper()
    width = "" if name in {"MXFP4", "NF4"} else str(values.get("num_bits", ""))
    group = values.get("group_size", -1)
    symmetry = " sym" if name == "INT" and values.get("is_symmetric") else ""
    clip = "" if (ratio := values.get("clip_ratio", 1)) == 1 else f" clip {ratio:g}"
    return f"{name}{width}{symmetry} {'per row' if group == -1 else f'g{group}'}{clip}"


def _activations(what: str, values: Mapping[str, Any] | None) -> list[str]:
    return [] if values is None else [f"{what} {number_format(values)}".replace("per row", "per token")]


def _quantizer(values: Mapping[str, Any]) -> list[str]:
    options = ((" clip", "use_clip_search"), (" act-order", "use_act_order"))
    return [values.get("method", "rtn") + "".join(word for word, name in options if values.get(name))]


def _transform(values: Mapping[str, Any]) -> list[str]:
    parts = [] if values.get("flatten") is None else [f"flatten {values['flatten']:g}"]
    if values.get("permute"):
        parts.append("permute")
    if (rotation := values.get("rotation", "none")) != "none":
        parts.append(f"{rotation} Hadamard {values.get('rotation_block') or 'full'}")
    return parts


def _correction(values: Mapping[str, Any], with_rank: bool) -> list[str]:
    method = str(values.get("method", "none"))
    if method in _METHODLESS:
        return ["no correction"]
    rank = f" r{values.get('rank')}" if with_rank else ""
    factors = "" if values.get("factor_dtype", "bfloat16") == "bfloat16" else f" {values['factor_dtype']}"
    options = "".join(f" {name}={value}" for name, value in sorted((values.get("options") or {}).items()))
    return [method + rank + factors + (" refit" if values.get("refit") else "") + options]
