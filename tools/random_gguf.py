"""A GGUF file of a large shape with random Q4_0 weights: what ``qerve bench --random`` is compared with.

    python -m tools.random_gguf tinyllama-1.1b tinyllama-random.Q4_0.gguf
    qerve bench --random tinyllama-1.1b --against llama.cpp --gguf tinyllama-random.Q4_0.gguf

As llama.cpp's own Q4_0 files: every linear layer and the embedding in Q4_0, the head in Q6_K, norms in float32; no
vocabulary, since speed needs none. Scales are such that activations neither vanish nor overflow.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from models.bench.random_model import SHAPES
from models.llama.config import LlamaConfig
from models.llama.gguf import gguf_name
from models.scheme import HEAD

_Q4_0, _Q6_K, _F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K, gguf.GGMLQuantizationType.F32
_SCALE = 0.004


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write(SHAPES[arguments.shape], arguments.file)


def write(config: LlamaConfig, path: Path) -> None:
    """Write random weights of the shape ``config`` to ``path``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    for name, values, kind in _tensors(config):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def _tensors(
    config: LlamaConfig,
) -> Iterator[tuple[str, NDArray[np.uint8] | NDArray[np.float32], gguf.GGMLQuantizationType]]:
    generator = np.random.default_rng(0)
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            yield gguf_name(name), np.ones(shape, dtype=np.float32), _F32
        else:
            num_rows, num_columns = shape
            kind = _Q6_K if name.removesuffix(".weight") == HEAD else _Q4_0
            yield gguf_name(name), _random_blocks(generator, num_rows, num_columns, kind), kind


def _random_blocks(
    generator: np.random.Generator, num_rows: int, num_columns: int, kind: gguf.GGMLQuantizationType
) -> NDArray[np.uint8]:
    """(num_rows, bytes of a row): random codes, every block with the same float16 scale."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (num_rows, num_columns // block, num_bytes), dtype=np.uint8)
    scale = np.array([_SCALE if kind is _Q4_0 else _SCALE / 1024], dtype=np.float16).view(np.uint8)
    place = slice(0, 2) if kind is _Q4_0 else slice(num_bytes - 2, num_bytes)
    blocks[:, :, place] = scale
    return blocks.reshape(num_rows, -1)


if __name__ == "__main__":
    main()
