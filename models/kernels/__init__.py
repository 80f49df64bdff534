"""Kernel backends that run a quantized linear layer; adding one is its file and its place in the order below."""

from ..errors import KernelError
from .base import KernelBackend
from .dequantized import DequantizedBackend
from .native.backend import NativeBackend
from .native.inputs import ActivationBits
from .reference import ReferenceBackend
from .torch_int4 import TorchInt4Backend
from .torch_int8 import TorchInt8Backend

AUTO = "auto"


def default_backends(activation_bits: ActivationBits = 8) -> tuple[KernelBackend, ...]:
    """Those that serve, in order of preference; the reference backend, which runs every layer, comes last."""
    return (NativeBackend(activation_bits), TorchInt4Backend(), TorchInt8Backend(), ReferenceBackend())


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
    backends = (*default_backends(activation_bits), DequantizedBackend())
    chosen = tuple(backend for backend in backends if backend.name == preference)
    if not chosen:
        names = ", ".join((AUTO, *(backend.name for backend in backends)))
        raise KernelError(f"kernel backend {preference!r} is unknown; choose one of {names}")
    return chosen
