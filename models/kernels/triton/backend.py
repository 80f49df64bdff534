"""The Triton kernels as a backend for NVIDIA GPUs: codes of every format, low-rank terms inside the products.

Layers whose inputs are not quantized, or not to a grid that integer tensor cores know, take 16-bit inputs
(``linear16``).
"""

from collections.abc import Iterator

import torch

from ...errors import KernelError
from ...types import LinearWeights
from ..base import LinearSpec, PreparedLinear
from .environment import TritonEnvironment

_DTYPES = (torch.bfloat16, torch.float16)


class TritonBackend:
    """NVIDIA GPUs of compute capability 8.0 or newer; bfloat16 and float16.

    is_interpreter_wanted: with ``TRITON_INTERPRET=1`` layers on the CPU too. That is thousands of times slower than any
        other backend, so only those who ask for this backend by its name get it
    """

    name = "triton"

    def __init__(self, *, is_interpreter_wanted: bool = False, environment: TritonEnvironment | None = None) -> None:
        """Use ``environment``; None: look for Triton, and at the variables of the process, when first asked."""
        self._is_interpreter_wanted = is_interpreter_wanted
        self._environment = environment

    @property
    def environment(self) -> TritonEnvironment:
        """What there is of Triton."""
        return self._environment or TritonEnvironment.read()

    def unsupported(self, spec: LinearSpec) -> str | None:
        """The first condition that ``spec`` does not meet."""
        return next(self._obstacles(spec), None)

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Repack ``weights`` on ``device``.

        Raises:
            KernelError: ``unsupported`` has something against the layer.
        """
        reason = self.unsupported(LinearSpec.of(weights, device, dtype))
        if reason is not None:
            raise KernelError(f"{self.name}: {reason}")
        from .layer16 import TritonLinear16  # imports triton

        return TritonLinear16.of(weights, device, dtype)

    def _obstacles(self, spec: LinearSpec) -> Iterator[str]:
        if spec.device.type == "cpu" and not self._is_interpreter_wanted:
            yield "runs on CUDA devices only, not on cpu"
            return
        reason = self.environment.why_not(spec.device)
        if reason is not None:
            yield reason
        if spec.dtype not in _DTYPES:
            yield f"runs in bfloat16 and float16, not in {str(spec.dtype).removeprefix('torch.')}"
