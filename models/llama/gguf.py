"""GGUF files as checkpoints: names, layouts and settings turned back into those of the Hugging Face original."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import combine_fingerprint, file_digest
from .config import LlamaConfig
from .config_fields import ConfigFields
from .gguf_file import GgufFile
from .gguf_rope import recover_llama3_scaling
from .gguf_tokenizer import build_tokenizer_files, special_token_ids

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""GGUF architecture -> Hugging Face one. Mistral is written as ``llama``."""

ROPE_FACTORS = "rope_freqs.weight"
PERMUTED = (".self_attn.q_proj.weight", ".self_attn.q_proj.bias", ".self_attn.k_proj.weight", ".self_attn.k_proj.bias")

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MAX_LISTED = 5


class GgufCheckpoint:
    """A GGUF file, dequantized tensor by tensor.

    Raises:
        CheckpointError: on construction, when the file is damaged, of an unsupported architecture or tokenizer, or its
            tensors are not what its metadata says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        fields = ConfigFields(self._file.metadata, f"{path}: metadata")
        self._architecture = _architecture(fields)
        self.hf_config: dict[str, Any] = _hf_config(fields, self._architecture, self._file)
        self.config = LlamaConfig.from_hf(self.hf_config, f"{path}: metadata")
        stops = special_token_ids(self._file.metadata)
        self.generation_config: dict[str, Any] = {"eos_token_id": stops} if stops else {}
        if self.config.bos_token_id is not None:
            self.generation_config["bos_token_id"] = self.config.bos_token_id
        self.tokenizer_files = build_tokenizer_files(fields)
        self._check()

    @property
    def dense_bytes(self) -> int:
        """Size of all parameters in 16 bits; a tied head counts once."""
        return 2 * self.config.num_parameters

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the settings and the file, hex; reads every byte on first use."""
        return combine_fingerprint(self, {"model.gguf": file_digest(self.path)})

    def tensor(self, name: str, narrow: bool = False) -> Tensor:
        """The parameter ``name`` on the CPU: float16 and bfloat16 as stored, other types dequantized to float32.

        With ``narrow``, to bfloat16 instead of float32.

        Raises:
            CheckpointError: it does not exist, or its type cannot be dequantized.
        """
        stored_name = gguf_name(name)
        if stored_name not in self._file.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {stored_name} ({name})")
        tensor = self._file.read(stored_name, narrow)
        if self._architecture == "llama" and name.endswith(PERMUTED):
            return undo_row_permutation(tensor, self.config.head_dim)
        return tensor

    def _check(self) -> None:
        expected = {gguf_name(name): shape for name, shape in self.config.tensor_shapes().items()}
        missing = [name for name in expected if name not in self._file.tensors]
        surplus = sorted(self._file.tensors.keys() - expected.keys() - {ROPE_FACTORS})
        for names, problem in ((missing, "missing"), (surplus, f"unknown to architecture {self._architecture}")):
            if names:
                raise CheckpointError(f"{self.path}: tensors {problem}: {', '.join(names[:MAX_LISTED])}")
        for name, shape in expected.items():
            stored = self._file.tensors[name].shape
            if stored != shape:
                raise CheckpointError(f"{self.path}: tensor {name} has shape {stored}, the metadata make it {shape}")


def undo_row_permutation(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection from llama.cpp's order back to that of Hugging Face.

    llama.cpp rotates neighbouring channels, Hugging Face channel i with channel i + head_dim / 2; so llama.cpp's
    converter interleaves the two halves of each head.

    Args:
        tensor: (num_heads * head_dim, ...), a weight or a bias.
        head_dim: channels of a head.
    """
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _architecture(fields: ConfigFields) -> str:
    name = fields.get("general.architecture")
    if name not in tuple(ARCHITECTURES):
        raise CheckpointError(
            f"{fields.where}: the architecture is {name}; supported in GGUF are {', '.join(ARCHITECTURES)} "
            "(LLaMA 1-3 and what is built like them, Mistral, Qwen2)"
        )
    if fields.integer("split.count", 1, least=0) > 1:
        raise CheckpointError(
            f"{fields.where}: the model is split over several files; join them: llama-gguf-split --merge"
        )
    if fields.integer(f"{name}.expert_count", 0, least=0):
        raise CheckpointError(f"{fields.where}: mixtures of experts are not supported")
    return str(name)


def _hf_config(fields: ConfigFields, architecture: str, file: GgufFile) -> dict[str, Any]:
    """The ``config.json`` that the file's metadata stand for."""

    def size(key: str, default: int | None = None) -> int:
        return fields.integer(f"{architecture}.{key}", default)

    num_heads = size("attention.head_count")
    hidden_size = size("embedding_length")
    head_dim = size("attention.key_length", hidden_size // num_heads)
    tokens = fields.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": size("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": hidden_size,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": size("context_length"),
        "tie_word_embeddings": _TOP_NAMES["lm_head.weight"] not in file.tensors,
        "rope_theta": fields.number(f"{architecture}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, architecture, head_dim, file),
        "bos_token_id": fields.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.optional_integer("tokenizer.ggml.eos_token_id"),
    }
    for key, names in (("attention_bias", ("attn_q", "attn_output")), ("mlp_bias", ("ffn_gate", "ffn_down"))):
        if architecture == "llama":
            config[key] = any(f"blk.0.{name}.bias" in file.tensors for name in names)
    window = fields.optional_integer(f"{architecture}.attention.sliding_window")
    if window and architecture == "llama":
        config.update(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window)
    return config


def _rope_scaling(fields: ConfigFields, architecture: str, head_dim: int, file: GgufFile) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope"
    rotated = fields.integer(f"{prefix}.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(f"{fields.where}: only {rotated} of {head_dim} channels rotate, which is not supported")
    # llama.cpp takes the factor to mean linear scaling where no type is named.
    kind = fields.get(f"{prefix}.scaling.type") or "linear"
    factor = fields.get(f"{prefix}.scaling.factor") or fields.get(f"{prefix}.scale_linear") or 1.0
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{fields.where}: rope scaling {kind!r} is not supported; none, linear and llama3 are")
    is_linear = kind == "linear" and factor != 1.0
    if ROPE_FACTORS not in file.tensors:
        return {"rope_type": "linear", "factor": factor} if is_linear else None
    if is_linear:
        raise CheckpointError(f"{fields.where}: linear rope scaling together with {ROPE_FACTORS} is not supported")
    theta = fields.number(f"{prefix}.freq_base", 10000.0)
    return recover_llama3_scaling(file.read(ROPE_FACTORS).to(torch.float64), theta, head_dim, str(file.path))


def gguf_name(name: str) -> str:
    """What GGUF files call the tensor that Hugging Face checkpoints call ``name``."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer_index, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer_index}.{_LAYER_NAMES.get(module, module)}.{kind}"
