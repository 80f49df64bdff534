"""Kernel backends that run a quantized linear layer; adding one is its file and its place in the order below."""

from ..errors import KernelError
from .base import KernelBackend
from .dequantized import DequantizedBackend
from .native.backend import NativeBackend
from .native.inputs import ActivationBits
from .reference import ReferenceBackend
from .torch_int4 import TorchInt4Backend
from .torch_int8 import TorchInt8Backend
from .triton.backend import TritonBackend

AUTO = "auto"


def default_backends(activation_bits: ActivationBits = 8) -> tuple[KernelBackend, ...]:
    """Those that serve, in order of preference; the reference backend, which runs every layer, comes last."""
    return (
        NativeBackend(activation_bits),
        TritonBackend(),
        TorchInt4Backend(),
        TorchInt8Backend(),
        ReferenceBackend(),
    )


def get_backends(preference: str = AUTO, activation_bits: ActivationBits = 8) -> tuple[KernelBackend, ...]:
    """The backends to select from: all that serve for ``auto``, else only the one named.

    Args:
        preference: ``auto``, or a backend's name.
        activation_bits: what the native backend rounds inputs to that the artifact leaves unquantized.

    Raises:
        KernelError: no backend has that name.
    """
    if preference == AUTO:
        return default_backends(activation_bits)
    # asked for by name, Triton may be interpreted: see its backend
    backends = (*default_backends(activation_bits), DequantizedBackend(), TritonBackend(is_interpreter_wanted=True))
    chosen = {backend.name: backend for backend in backends}
    if preference not in chosen:
        raise KernelError(f"kernel backend {preference!r} is unknown; choose one of {', '.join((AUTO, *chosen))}")
    return (chosen[preference],)
