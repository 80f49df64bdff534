"""Ways to run one linear layer on a GPU: our kernels, and the libraries that they are measured against.

The weights are random, since time does not depend on them. Each contender is made for one shape and then called with
inputs of several numbers of rows. Libraries that are not there, or do not take a shape, say so in words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ..kernels import get_backends
from ..kernels.base import LinearSpec
from ..quant.packing import pack
from ..scheme import ActivationScheme, QuantScheme
from ..types import Correction, LinearWeights, QuantizedWeight
from .probe import ProbeError
from .roofline import W4A8, W4A16, W8A8, Scheme, Shape

Run = Callable[[Tensor], object]
BACKEND = "triton"
CUBLAS = "cuBLAS bf16"
FACTOR = 0.01
_INNER_TILES = 8


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a layer.

    scheme: what it computes in; None: 16 bits throughout
    make:   for a shape on a device. Raises ProbeError where it cannot be had
    """

    name: str
    scheme: Scheme | None
    rank: int
    is_fused: bool
    make: Callable[[Shape, torch.device], Run]


def random_linear(shape: Shape, scheme: Scheme, rank: int, device: torch.device) -> LinearWeights:
    """Random weights of ``shape`` on ``device``: symmetric codes in groups, bfloat16 factors."""
    quant = QuantScheme(scheme.weight_bits, scheme.group_size, is_symmetric=True)
    codes = torch.randint(quant.max_code + 1, (shape.out_features, shape.in_features), dtype=torch.uint8, device=device)
    groups = (shape.out_features, quant.num_groups(shape.in_features))
    scale = torch.full(groups, FACTOR, dtype=torch.float16, device=device)
    correction = None
    if rank:
        up = torch.full((shape.out_features, rank), FACTOR, dtype=torch.bfloat16, device=device)
        down = torch.full((rank, shape.in_features), FACTOR, dtype=torch.bfloat16, device=device)
        correction = Correction(up, down)
    activations = ActivationScheme(8, is_symmetric=True) if scheme.activation_bits == 8 else None
    return LinearWeights(QuantizedWeight(codes, scale, None, quant), correction, activations=activations)


def ours(scheme: Scheme, rank: int, *, is_fused: bool = True) -> Contender:
    """Our kernels; unfused: at rank 0, then two products and a sum by torch."""

    def make(shape: Shape, device: torch.device) -> Run:
        weights = random_linear(shape, scheme, rank if is_fused else 0, device)
        (backend,) = get_backends(BACKEND)
        reason = backend.unsupported(LinearSpec.of(weights, device, torch.bfloat16))
        if reason is not None:
            raise ProbeError(f"{BACKEND}: {reason}")
        prepared = backend.prepare(weights, device, torch.bfloat16)
        if is_fused or not rank:
            return prepared
        up, down = (
            torch.full(size, FACTOR, dtype=torch.bfloat16, device=device)
            for size in ((shape.out_features, rank), (rank, shape.in_features))
        )
        return lambda x: prepared(x).add_(F.linear(F.linear(x, down), up))

    form = "" if not rank else f" rank {rank}" if is_fused else f" rank {rank} unfused"
    return Contender(f"qerve {scheme.name}{form}", scheme, rank, is_fused, make)


def _cublas(shape: Shape, device: torch.device) -> Run:
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.bfloat16, device=device)
    return lambda x: torch.mm(x, weight)


def _torch_int4(shape: Shape, device: torch.device) -> Run:
    weights = random_linear(shape, W4A16, 0, device).quantized
    group = W4A16.group_size
    try:
        # The even column lies in the upper half of a byte here, and in the lower one of ours.
        halves = pack(weights.codes.cpu(), 4).to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack((halves << 4) | (halves >> 4), _INNER_TILES)
    except (RuntimeError, NotImplementedError) as error:
        raise ProbeError(f"torch's int4 product: {_first_line(error)}") from error
    grid = torch.stack([weights.scale, torch.zeros_like(weights.scale)], -1).transpose(0, 1).to(torch.bfloat16)
    grid = grid.contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)


def _gemlite(shape: Shape, device: torch.device) -> Run:
    core = _library("gemlite.core", "gemlite")
    weights = random_linear(shape, W4A16, 0, device).quantized
    layer = core.GemLiteLinearTriton(
        W_nbits=4,
        group_size=W4A16.group_size,
        in_features=shape.in_features,
        out_features=shape.out_features,
        input_dtype=core.DType.BF16,
        output_dtype=core.DType.BF16,
    )
    scale = weights.scale.to(torch.bfloat16)
    layer.pack(weights.codes, scale, torch.full_like(scale, 8.0), None)
    run: Run = layer.forward
    return run


def _marlin(shape: Shape, device: torch.device) -> Run:
    utils = _library("vllm.model_executor.layers.quantization.utils.marlin_utils", "vllm")
    testing = _library("vllm.model_executor.layers.quantization.utils.marlin_utils_test", "vllm")
    codes = _library("vllm.scalar_type", "vllm").scalar_types.uint4b8
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.bfloat16, device=device)
    _dense, packed, scale, g_idx, order, _permutation = testing.marlin_quantize(
        weight, codes, W4A16.group_size, act_order=False
    )
    workspace = utils.marlin_make_workspace_new(device)
    return lambda x: utils.apply_gptq_marlin_linear(
        input=x,
        weight=packed,
        weight_scale=scale,
        weight_zp=utils.marlin_make_empty_g_idx(device),
        g_idx=g_idx,
        g_idx_sort_indices=order,
        workspace=workspace,
        wtype=codes,
        output_size_per_partition=shape.out_features,
        input_size_per_partition=shape.in_features,
        is_k_full=True,
    )


def _library(module: str, package: str) -> Any:
    """The module of a library that nothing here needs.

    Raises:
        ProbeError: it is not installed, or its parts have other names.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ProbeError(f"{package} cannot be used: {_first_line(error)}") from error


def made(contender: Contender, shape: Shape, device: torch.device) -> Run:
    """``contender`` for ``shape``.

    Raises:
        ProbeError: it cannot be had, whatever its library made of it.
    """
    try:
        return contender.make(shape, device)
    except ProbeError:
        raise
    except (KernelError, RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise ProbeError(f"{contender.name}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


LIBRARIES: Mapping[str, Contender] = MappingProxyType({
    name: Contender(name, scheme, 0, True, make)
    for name, scheme, make in (
        (CUBLAS, None, _cublas),
        ("torch int4", W4A16, _torch_int4),
        ("gemlite W4A16", W4A16, _gemlite),
        ("Marlin W4A16 (vLLM)", W4A16, _marlin),
    )
})  # fmt: skip
"""By name."""


def contenders(rank: int) -> tuple[Contender, ...]:
    """All that are measured, in the order of the table."""
    own = tuple(
        contender
        for scheme in (W4A16, W4A8, W8A8)
        for contender in (ours(scheme, 0), ours(scheme, rank), ours(scheme, rank, is_fused=False))
    )
    return (LIBRARIES[CUBLAS], *own, *(it for name, it in LIBRARIES.items() if name != CUBLAS))
