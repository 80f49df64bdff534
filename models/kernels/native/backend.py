"""The native CPU kernels as a backend: integer products with the low-rank term inside, one call per layer.

A layer whose artifact quantizes its inputs gets exactly that grid. Other layers have theirs rounded to 8 bits, with a
scale per row and block of 32 or 64 channels, or to 16 bits where that is asked for: twice the products, and a rounding
that no longer shows. Sums over a block are exact; what is added up of them is float32, and so is the output until it is
rounded to the network's type.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import KernelError
from ...scheme import PER_TOKEN
from ...types import LinearWeights, RowRanks
from ..base import LinearSpec, PreparedLinear
from .inputs import ActivationBits, LinearInput, why_not
from .pack import PackedMatrix, pack_linear, widest_block
from .program import LinearCall
from .runtime import Runtime, default_runtime

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class NativeLinear:
    """One layer in the kernels' layout, run on its own.

    activation_bits: what its backend rounds inputs to that the artifact leaves alone
    """

    matrix: PackedMatrix
    inputs: LinearInput
    runtime: Runtime
    activation_bits: ActivationBits
    _call: LinearCall = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_call", LinearCall(self.runtime, self.matrix, self.inputs))

    @property
    def nbytes(self) -> int:
        """See ``PreparedLinear``."""
        return self.matrix.nbytes + self.inputs.nbytes

    def __call__(self, x: Tensor, row_ranks: RowRanks | None = None) -> Tensor:
        """See ``PreparedLinear``; computed in float32."""
        return self._call(x.float(), row_ranks).to(x.dtype)


class NativeBackend:
    """Integer kernels for the processor's own instruction set: INT and MXINT weights, low-rank terms, rotated inputs.

    activation_bits: how inputs are rounded that the artifact does not quantize
    """

    name = "native"

    def __init__(self, activation_bits: ActivationBits = 8, runtime: Runtime | str | None = None) -> None:
        """Use ``runtime``, or the reason why there is none; None: the process's own, opened when first needed."""
        self.activation_bits = activation_bits
        self._runtime = runtime

    @property
    def runtime(self) -> Runtime | str:
        """The kernels, or the reason why there are none."""
        return default_runtime() if self._runtime is None else self._runtime

    def unsupported(self, spec: LinearSpec) -> str | None:
        """The first condition that ``spec`` does not meet."""
        return next(self._obstacles(spec), None)

    def prepare(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> PreparedLinear:
        """Repack codes and factors.

        Raises:
            KernelError: ``unsupported`` has something against the layer.
        """
        runtime, block = self.runtime, _block(LinearSpec.of(weights, device, dtype))
        if isinstance(runtime, str) or block is None:
            raise KernelError(f"{self.name}: {self.unsupported(LinearSpec.of(weights, device, dtype))}")
        matrix, inputs = pack_linear(runtime, weights, block), LinearInput.of(weights, self.activation_bits)
        return NativeLinear(matrix, inputs, runtime, self.activation_bits)

    def _obstacles(self, spec: LinearSpec) -> Iterator[str]:
        if spec.device.type != "cpu":
            yield f"runs on the CPU only, not on {spec.device.type}"
            return
        if isinstance(self.runtime, str):
            yield self.runtime
        if spec.dtype not in _DTYPES:
            yield f"runs in float32, bfloat16 and float16, not in {str(spec.dtype).removeprefix('torch.')}"
        if spec.scheme.format not in {"int", "mxint"}:
            yield f"takes codes in uniform steps (int, mxint), not {spec.scheme.format}"
        reason = None if spec.activations is None else why_not(spec.activations)
        if reason is not None:
            yield reason
        if spec.in_features % 32:
            yield f"in_features must be a multiple of 32, not {spec.in_features}"
        if _block(spec) is None:
            length = spec.scheme.group_length(spec.in_features)
            yield f"scales must be shared by a multiple of 32 input channels, not by {length}"
        if spec.rotation_block & (spec.rotation_block - 1):
            yield f"rotates in blocks of a power of two, not of {spec.rotation_block}"


def _block(spec: LinearSpec) -> int | None:
    """Channels per integer sum: within a group of the weight, and of the input where it has groups."""
    lengths = [spec.scheme.group_length(spec.in_features)]
    if spec.activations is not None and spec.activations.group_size != PER_TOKEN:
        lengths.append(spec.activations.group_size)
    return widest_block(spec.in_features, *lengths)
