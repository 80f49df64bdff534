"""Format of the compressed-tensors library, which vLLM reads: one scheme per group of layers, tensors per layer.

    pack-quantized  weight_packed (out, ceil(in * bits / 32)) int32: codes as a dense little-endian bit stream along the
                    input channels; weight_scale (out, groups); weight_shape (2,) int64; asymmetric: weight_zero_point
                    (ceil(out * bits / 32), groups) int32, packed along the output channels
    int-quantized   weight (out, in) int8, weight_scale (out, groups): integer products, inputs quantized per token

Stored fields are unsigned, ``2**(bits - 1)`` above the signed value, which is what codes are in an artifact: codes and
zero points go over as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant.packing import pack
from ..scheme import PER_CHANNEL, ActivationScheme, QuantScheme
from ..types import QuantizedWeight
from .source import cast_scale

PACKED, SIGNED = "pack-quantized", "int-quantized"
VERSION = "0.20.0"
"""Of the library whose format this is. 2, 4 and 8 bits have always been the same; 0.17 still padded other widths."""


def packed_tensors(path: str, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a layer in format pack-quantized."""
    bits = quantized.scheme.num_bits
    tensors = {
        "weight_packed": _words(quantized.codes, bits),
        "weight_scale": cast_scale(f"{path}.weight_scale", quantized.scale, dtype),
        "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if quantized.zero_point is not None:
        tensors["weight_zero_point"] = _words(quantized.zero_point.T.contiguous(), bits).T.contiguous()
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def signed_tensors(path: str, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a layer in format int-quantized; its scheme is symmetric."""
    signed = quantized.codes.to(torch.int16) - (1 << (quantized.scheme.num_bits - 1))
    return {
        f"{path}.weight": signed.to(torch.int8).contiguous(),
        f"{path}.weight_scale": cast_scale(f"{path}.weight_scale", quantized.scale, dtype),
    }


def quantization_config(
    groups: Sequence[tuple[QuantScheme, Sequence[str]]], layout: str, activations: ActivationScheme | None
) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``.

    Args:
        groups: schemes with the module paths that have them; a single one stands for all linear layers.
        layout: ``pack-quantized`` or ``int-quantized``.
        activations: of 8 bits per token, or None.
    """
    config_groups = {}
    for index, (scheme, paths) in enumerate(groups):
        config_groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 else list(paths),
            "format": layout,
            "weights": _arguments(scheme),
            "input_activations": None if activations is None else _input_arguments(activations),
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": config_groups,
    }


def _arguments(scheme: QuantScheme) -> dict[str, Any]:
    is_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if is_channel else "group",
        "group_size": None if is_channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _input_arguments(activations: ActivationScheme) -> Mapping[str, Any]:
    return {
        "num_bits": activations.num_bits,
        "type": "int",
        "symmetric": activations.is_symmetric,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _words(codes: Tensor, num_bits: int) -> Tensor:
    """(rows, columns) uint8 -> (rows, words) int32: the artifact's bit stream, filled up to whole words."""
    stream = pack(codes, num_bits)
    return F.pad(stream, (0, -stream.shape[1] % 4)).flatten().view(torch.int32).view(len(codes), -1)
