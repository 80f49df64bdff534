"""Which layers the INT8 tensor cores take; asked without importing Triton."""

from collections.abc import Iterator

from ...scheme import PER_TOKEN, ActivationScheme, QuantScheme

MAX_IN_FEATURES = 1 << 16
"""Codes of +-128 times weights of +-255 steps: the sum of more channels could leave int32."""


def integer_obstacle(scheme: QuantScheme, activations: ActivationScheme | None, in_features: int) -> str | None:
    """Why a layer goes to the 16-bit kernels instead, written for the user; None: the INT8 kernels take it."""
    return next(_obstacles(scheme, activations, in_features), None)


def _obstacles(scheme: QuantScheme, activations: ActivationScheme | None, in_features: int) -> Iterator[str]:
    if activations is None:
        yield "its inputs are not quantized"
        return
    if scheme.format not in {"int", "mxint"}:
        yield f"integer products need weights in uniform steps (int, mxint), not {scheme.format}"
    reason = rounding_obstacle(activations)
    if reason is not None:
        yield reason
    if in_features > MAX_IN_FEATURES:
        yield f"sums of {in_features} channels do not fit 32 bits; {MAX_IN_FEATURES} do"


def rounding_obstacle(activations: ActivationScheme) -> str | None:
    """Why ``quantize.input_kernel`` cannot round inputs to this grid; None: it can."""
    if activations.format == "mxfp4":
        return "activations are rounded to uniform steps (int, mxint), not to mxfp4"
    group = activations.group_size
    if group != PER_TOKEN and group & (group - 1):
        return f"activations must share a scale in groups of a power of two, not {group}"
    return None


def has_offset(activations: ActivationScheme) -> bool:
    """Steps from zero may be beyond a signed byte: codes are moved by an offset."""
    return activations.format == "int" and not activations.is_symmetric and activations.num_bits == 8


def input_group(activations: ActivationScheme | None) -> int:
    """Channels of a token that share a scale, 0: all of them, as the kernels are told."""
    return 0 if activations is None or activations.group_size == PER_TOKEN else activations.group_size
