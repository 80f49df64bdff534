"""Tiny random checkpoints with a real, small tokenizer, written to disk without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor

from models.llama.config import LlamaConfig

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320

CORPUS = [
    "The river runs past the old mill, and the mill has not turned in 40 years.",
    "She counted 123 boats; he said there were 124. They're both right, aren't they?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))  # 23",
    "Ünïcödé wörds, 日本語, emoji 🙂🙃 and ½ of a café.",
    "  leading spaces,\ttabs\r\nand    runs of   spaces  ",
]

CHATML_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of a LLaMA with two layers; ``changes`` replace or add settings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def random_tensors(values: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters for ``values``, large enough for logits that differ clearly between tokens."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in LlamaConfig.from_hf(values, "config.json").tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        is_gain = name.endswith("norm.weight")
        tensors[name] = (1.0 + 0.2 * noise if is_gain else noise / shape[-1] ** 0.5).to(dtype)
    return tensors


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with ``VOCAB_SIZE`` tokens, trained on ``CORPUS``."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tokenizer_files() -> dict[str, bytes]:
    """The files of ``train_tokenizer`` with a chat template."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML_TEMPLATE,
    }
    return {
        "tokenizer.json": train_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def write_checkpoint(
    directory: Path,
    values: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    num_shards: int = 1,
) -> Path:
    """Write a Hugging Face directory; with several shards, an index as well."""
    values = tiny_config() if values is None else values
    tensors = random_tensors(values) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    for name, content in tokenizer_files().items():
        (directory / name).write_bytes(content)
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = sorted(tensors)[shard::num_shards]
        save_file({name: tensors[name] for name in names}, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
