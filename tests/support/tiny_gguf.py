"""Tiny GGUF files, written as llama.cpp's converter lays them out."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from torch import Tensor

from tests.support.tiny_checkpoints import CHATML_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def gguf_name(name: str) -> str:
    """llama.cpp's name for a Hugging Face tensor, by the table in the gguf package."""
    stem, _, kind = name.rpartition(".")
    return f"{_name_map().get_name(stem)}.{kind}"


@functools.cache
def _name_map() -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of query and key projections."""
    head = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def byte_level_metadata(tokenizer: Tokenizer | None = None, pre: str = "smollm") -> dict[str, Any]:
    """Tokenizer metadata of a byte-level BPE tokenizer."""
    tokenizer = tokenizer or train_tokenizer()
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML_TEMPLATE,
    }


def model_metadata(values: dict[str, Any]) -> dict[str, Any]:
    """Model metadata for a ``config.json``, without rope scaling."""
    arch = "qwen2" if values["model_type"] == "qwen2" else "llama"
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim", values["hidden_size"] // heads)
    numbers: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "block_count": values["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(values.get("rms_norm_eps", 1e-6)),
        "rope.freq_base": float(values.get("rope_theta", 10000.0)),
        "rope.dimension_count": head_dim,
        "attention.key_length": head_dim,
    }
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in numbers.items()}


def gguf_tensors(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors under llama.cpp's names, query and key rows permuted where its converter permutes them."""
    converted = {}
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    for name, tensor in tensors.items():
        array = tensor.to(torch.float32).numpy()
        if values["model_type"] != "qwen2" and (".q_proj." in name or ".k_proj." in name):
            array = permute(array, heads if ".q_proj." in name else kv_heads)
        converted[gguf_name(name)] = array
    return converted


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a file; matrices are stored as ``kind``, vectors in float32."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        stored = GGMLQuantizationType.F32 if array.ndim == 1 else kind
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
