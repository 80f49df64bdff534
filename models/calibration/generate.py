"""Calibration text which the model itself writes: the default, since it needs no data at all.

Each sequence starts with a random token; the next few are the most likely ones, the rest are sampled at temperature 1.
That hybrid keeps the text on the model's own distribution and diverse (LLM-QAT, arXiv 2305.17888, section 3.1).
A throw-away copy of the network with 8-bit weights does the writing: half the memory of the 16-bit checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels import default_backends
from ..layers.linear import LowRankLinear
from ..llama.batch import Batch, SequenceSpan
from ..llama.checkpoint import Checkpoint, DenseWeights
from ..llama.config import LlamaConfig
from ..llama.kv_cache import PagedKVCache
from ..llama.model import LlamaForCausalLM
from ..memory import return_freed_memory
from ..quant.rtn import quantize_rtn
from ..scheme import PER_CHANNEL, QuantScheme
from ..types import LinearWeights

NUM_GREEDY = 4
LARGEST_CHUNK = 64
BLOCK_SIZE = 16
EIGHT_BIT = QuantScheme(num_bits=8, group_size=PER_CHANNEL, is_symmetric=True)


class EightBitWeights(DenseWeights):
    """A checkpoint's parameters with every linear layer rounded to 8 bits per output channel."""

    def linear(self, path: str) -> nn.Module:
        """The 8-bit layer for module ``path``; its dense weight is released at once."""
        weight = self.tensor(f"{path}.weight").float()
        bias = self.tensor(f"{path}.bias") if self.checkpoint.config.linear_shapes()[path].has_bias else None
        weights = LinearWeights(quantize_rtn(weight, EIGHT_BIT), bias=bias)
        return LowRankLinear.of(weights, default_backends(), device=self.device, dtype=self.dtype, where=path)


def generate_tokens(
    checkpoint: Checkpoint,
    num_sequences: int,
    sequence_length: int,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Write ``num_sequences`` sequences of ``sequence_length`` tokens with an 8-bit copy of ``checkpoint``.

    Returns:
        (num_sequences * sequence_length,) int64, sequence after sequence. Seeded: the same call gives the same tokens
        on the same machine.
    """
    model = LlamaForCausalLM(checkpoint.config, EightBitWeights(checkpoint, dtype, device))
    return_freed_memory()
    generator = torch.Generator(device).manual_seed(seed)
    pieces: list[Tensor] = []
    for count in _chunks(checkpoint.config, num_sequences, sequence_length, dtype):
        written = sum(len(piece) for piece in pieces)

        def report(step: int, written: int = written, count: int = count) -> None:
            if on_progress is not None:
                on_progress(written * sequence_length + step * count, num_sequences * sequence_length)

        pieces.append(_write(model, count, sequence_length, generator, report))
    return torch.cat(pieces).flatten()


def writing_bytes(config: LlamaConfig, num_sequences: int, sequence_length: int, dtype: torch.dtype) -> int:
    """What ``generate_tokens`` holds on its device: the network in 8 bits, embedding and head, a cache."""
    weights = sum(shape.out_features * shape.in_features for shape in config.linear_shapes().values())
    together = max(_chunks(config, num_sequences, sequence_length, dtype))
    cache = together * -(-sequence_length // BLOCK_SIZE) * PagedKVCache.bytes_per_block(config, BLOCK_SIZE, dtype)
    num_tables = 1 if config.tie_word_embeddings else 2
    return weights + num_tables * dtype.itemsize * config.vocab_size * config.hidden_size + cache


def _chunks(config: LlamaConfig, num_sequences: int, sequence_length: int, dtype: torch.dtype) -> list[int]:
    """How many sequences to write at a time: as many as have a cache no larger than the 8-bit weights, evenly."""
    per_block = PagedKVCache.bytes_per_block(config, BLOCK_SIZE, dtype)
    per_sequence = -(-sequence_length // BLOCK_SIZE) * per_block
    weights = sum(shape.out_features * shape.in_features for shape in config.linear_shapes().values())
    largest = min(LARGEST_CHUNK, max(1, weights // per_sequence))
    num_chunks = -(-num_sequences // largest)
    return [len(range(start, num_sequences, num_chunks)) for start in range(num_chunks)]


@torch.inference_mode()
def _write(
    model: LlamaForCausalLM, count: int, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> Tensor:
    """(count, length) int64: all sequences advance together, one token per step."""
    device = model.device
    num_blocks = count * -(-length // BLOCK_SIZE)
    cache = PagedKVCache(model.config, num_blocks, BLOCK_SIZE, model.dtype, device)
    slots = torch.arange(cache.num_slots, device=device).view(count, -1)
    tokens = torch.empty(count, length, dtype=torch.int64, device=device)
    tokens[:, 0] = torch.randint(model.config.vocab_size, (count,), generator=generator, device=device)
    for step in range(1, length):
        spans = tuple(SequenceSpan(row, 1, step, slots[row, :step]) for row in range(count))
        batch = Batch(tokens[:, step - 1], torch.full((count,), step - 1, device=device), spans)
        logits = model.logits(model(batch, cache))
        if step <= NUM_GREEDY:
            tokens[:, step] = logits.argmax(-1)
        else:
            tokens[:, step] = _sample(logits, generator)
        report(step + 1)
    return tokens


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of ``logits`` (n, vocab_size), at temperature 1, by inverting the cumulative distribution.

    One random number per row, where ``torch.multinomial`` draws one per token of the vocabulary.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64, device=logits.device)
    tokens = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[-1] - 1).squeeze(1)
