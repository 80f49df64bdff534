"""NF4 as bitsandbytes stores it, for fine-tuning over a base of 4 bits (QLoRA, arXiv 2305.14314).

    weight              (out * in / 2, 1) uint8: two codes a byte in row-major order, the first in the upper half
    weight.absmax       (out * in / block,) float32: the largest magnitude of each block of consecutive weights
    weight.quant_map    (16,) float32: what the codes stand for
    weight.quant_state.bitsandbytes__nf4  uint8: JSON of block size, type and shape, as bytes

Blocks run over the flattened matrix; groups of an artifact run along its rows, so blocks and groups are the same where
the group size divides the rows, which it always does.
"""

import json
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..quant.nf import NF4_VALUES
from ..types import QuantizedWeight

STATE = "weight.quant_state.bitsandbytes__nf4"


def nf4_tensors(path: str, quantized: QuantizedWeight, dtype: str) -> dict[str, Tensor]:
    """Tensors of a layer.

    Raises:
        ExportError: its codes are not NF4's.
    """
    scheme = quantized.scheme
    if scheme.format != "nf4":
        raise ExportError(
            f"{path}: {scheme}; bitsandbytes reads NF4. Use --base dense, or rebuild with --format nf4 --group-size 64"
        )
    codes = quantized.codes.flatten()
    state = {
        "quant_type": "nf4",
        "blocksize": scheme.group_length(quantized.in_features),
        "dtype": dtype,
        "shape": [quantized.out_features, quantized.in_features],
    }
    return {
        f"{path}.weight": (codes[0::2] << 4 | codes[1::2])[:, None].contiguous(),
        f"{path}.weight.absmax": quantized.scale.float().flatten().contiguous(),
        f"{path}.weight.quant_map": torch.tensor(NF4_VALUES, dtype=torch.float32),
        f"{path}.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def nf4_config(dtype: str) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
