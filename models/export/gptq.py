"""GPTQ's checkpoint format, symmetric integers of 4 or 8 bits, as vLLM and the GPTQ libraries read it.

qweight (in * bits / 32, out) int32: codes packed along the input channels, lowest first
scales  (groups, out) float16
qzeros  (groups, out * bits / 32) int32: zero points less one (the first version's convention), along the outputs
g_idx   (in,) int32: the group of each input channel
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..quant.packing import pack
from ..scheme import QuantScheme
from ..types import QuantizedWeight
from .source import cast_scale


def check_gptq(path: str, scheme: QuantScheme, shape: tuple[int, int]) -> None:
    """Raise ExportError, naming the layer, when GPTQ's format has no place for it; ``shape`` is (out, in)."""
    if scheme.num_bits not in (4, 8) or not scheme.is_symmetric:
        raise ExportError(
            f"{path}: {scheme}; GPTQ's format is read for symmetric integers of 4 or 8 bits alone. Use --format "
            "compressed-tensors, or rebuild with --symmetric --num-bits 4"
        )
    per_word = 32 // scheme.num_bits
    if shape[0] % per_word or shape[1] % per_word:
        raise ExportError(
            f"{path}: {shape[0]} x {shape[1]} is not a multiple of {per_word} both ways; --format gptq not"
        )


def gptq_tensors(path: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of a layer."""
    bits, columns = quantized.scheme.num_bits, quantized.in_features
    num_groups = quantized.scheme.num_groups(columns)
    per_word = 32 // bits
    words = pack(quantized.codes, bits).flatten().view(torch.int32).view(len(quantized.codes), -1)
    stored_zero = (1 << (bits - 1)) - 1
    zero_word = sum(stored_zero << (bits * index) for index in range(per_word))
    group = torch.arange(columns, dtype=torch.int32) // quantized.scheme.group_length(columns)
    return {
        f"{path}.qweight": words.T.contiguous(),
        f"{path}.scales": cast_scale(f"{path}.scales", quantized.scale.T, torch.float16),
        f"{path}.qzeros": torch.full((num_groups, quantized.out_features // per_word), zero_word, dtype=torch.int32),
        f"{path}.g_idx": group,
    }


def gptq_config(scheme: QuantScheme) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``."""
    return {
        "quant_method": "gptq",
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
