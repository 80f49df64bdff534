"""Kernel backends that run a quantized linear layer; adding one is its file and its place in the order below."""

from ..errors import KernelError
from .base import KernelBackend
from .dequantized import DequantizedBackend
from .reference import ReferenceBackend
from .torch_int4 import TorchInt4Backend
from .torch_int8 import TorchInt8Backend

AUTO = "auto"


def default_backends() -> tuple[KernelBackend, ...]:
    """Those that serve, in order of preference; the reference backend, which runs every layer, comes last."""
    return (TorchInt4Backend(), TorchInt8Backend(), ReferenceBackend())


def get_backends(preference: str = AUTO) -> tuple[KernelBackend, ...]:
    """The backends to select from: all that serve for ``auto``, else only the one named.

    Raises:
        KernelError: no backend has that name.
    """
    if preference == AUTO:
        return default_backends()
    backends = (*default_backends(), DequantizedBackend())
    chosen = tuple(backend for backend in backends if backend.name == preference)
    if not chosen:
        names = ", ".join((AUTO, *(backend.name for backend in backends)))
        raise KernelError(f"kernel backend {preference!r} is unknown; choose one of {names}")
    return chosen
