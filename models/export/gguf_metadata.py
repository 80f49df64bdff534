"""The settings of a network as the metadata of a GGUF file: the way back from ``models.llama.gguf``."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..llama.config import LlamaConfig
from ..llama.gguf import ARCHITECTURES
from ..llama.rope import llama3_factors

FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8}
"""``general.file_type``: what most of the weights are."""

QUANTIZATION_VERSION = 2


def architecture(config: LlamaConfig) -> str:
    """llama.cpp's name for the network; it runs Mistral as a LLaMA."""
    return config.model_type if config.model_type in ARCHITECTURES else "llama"


def network_metadata(config: LlamaConfig, where: str) -> dict[str, Any]:
    """``general.architecture`` and what shapes the network.

    Raises:
        ExportError: llama.cpp has no such network.
    """
    name = architecture(config)
    if config.rope.rope_type == "dynamic":
        raise ExportError(f"{where}: rope scaling of type dynamic, which llama.cpp does not have; use `export dense`")
    if config.sliding_window is not None and config.full_attention_layers:
        raise ExportError(f"{where}: a sliding window in some layers alone, which GGUF cannot say of {name}")
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.rope.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    return {f"{name}.{key}": value for key, value in values.items()}


def rope_factors(config: LlamaConfig) -> Tensor | None:
    """What LLaMA 3's scaling divides each frequency by, (head_dim / 2,) float32; None: nothing."""
    if config.rope.rope_type != "llama3":
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return llama3_factors(config.rope, config.rope.theta**-exponents).float()


def row_order(config: LlamaConfig, path: str, num_rows: int) -> Tensor | None:
    """Order (num_rows,) in which llama.cpp wants the rows of a projection; None: as they are.

    It rotates neighbouring channels, Hugging Face channel i with i + head_dim / 2: its converter interleaves the halves
    of each head of queries and keys, and so does this. Qwen2 is not converted.
    """
    if architecture(config) != "llama" or not path.endswith((".q_proj", ".k_proj")):
        return None
    halves = torch.arange(num_rows).reshape(-1, 2, config.head_dim // 2)
    return halves.transpose(1, 2).flatten()
