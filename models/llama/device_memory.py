"""What a card's memory is given to: weights, key-value cache, recorded steps, workspace. The sum is what was asked for.

    budget    = gpu_memory_utilization * all of the card's memory
    kv_cache  = budget - weights - graphs - workspace, in whole blocks
    free      = what is left of the budget: less than a block, unless fewer blocks were asked for

Where there is a card, the workspace is measured: the peak of one step of as many tokens as a step may have. Here it is
computed, for plans that are made elsewhere; both add what CUDA and its libraries keep.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from ..errors import QerveError
from .config import LlamaConfig
from .kv_cache import PagedKVCache

BLOCK_SIZE = 16
CONTEXT_BYTES = 512 << 20
"""Of the CUDA context, cuBLAS's workspaces and loaded kernels: 300 to 500 MiB on current drivers."""
GRAPH_BYTES = 8 << 20
"""What the driver keeps of one recorded step of a few hundred launches, at most, as far as is published."""
_FLOAT_BYTES = 4
_MOST_SPLITS = 32
"""Of one context among programs (``kernels.triton.paged.MAX_SPLITS``)."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one card, as planned.

    weights:   all parameters in the form in which they are multiplied
    kv_cache:  blocks of keys and values, the scratch block included
    graphs:    recorded decode steps
    workspace: activations of a step, CUDA itself
    free:      of the budget, not given to anything
    """

    weights: int
    kv_cache: int
    graphs: int
    workspace: int
    free: int

    @property
    def budget(self) -> int:
        """The sum of all."""
        return self.weights + self.kv_cache + self.graphs + self.workspace + self.free

    def by_kind(self) -> dict[str, int]:
        """Name -> bytes, without the sum."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ServingShape:
    """How much is served at a time.

    graph_sizes: batch sizes of recorded decode steps; empty: none are
    num_graphs:  recordings of each size: two where rows may get less of the corrections
    """

    max_num_seqs: int
    step_tokens: int
    graph_sizes: Sequence[int] = ()
    num_graphs: int = 1


def plan_memory(
    budget: int, *, weights: int, workspace: int, graphs: int, bytes_per_block: int, max_blocks: int | None = None
) -> DeviceMemory:
    """Divide ``budget``: whole blocks of cache fill what the rest leaves, ``max_blocks`` at most.

    One block more than are handed out is for rows that fill up recorded steps.

    Raises:
        QerveError: not one block is left, with what takes how much and what to change.
    """
    left = budget - weights - workspace - graphs
    num_blocks = left // bytes_per_block
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks + 1)
    if num_blocks < 2:
        raise QerveError(
            f"{_gib(budget)} of device memory leave no room for a key-value cache beside {_gib(weights)} of weights, "
            f"{_gib(workspace)} of workspace and {_gib(graphs)} of recorded steps: raise gpu_memory_utilization, "
            "lower max_num_batched_tokens or max_num_seqs, or build with fewer bits"
        )
    return DeviceMemory(weights, num_blocks * bytes_per_block, graphs, workspace, left - num_blocks * bytes_per_block)


def estimate_workspace(config: LlamaConfig, shape: ServingShape, dtype: torch.dtype) -> int:
    """Peak bytes of the activations of one step of ``shape.step_tokens`` tokens, and what CUDA keeps.

    Inside a decoder layer, where an MLP's or an attention's intermediates live beside the hidden states, or in the
    head, whichever takes more. float32 copies, which norms and 8-bit inputs make, are counted once.
    """
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    narrow, wide = dtype.itemsize, _FLOAT_BYTES
    hidden = config.hidden_size * (2 * narrow + wide)
    attention = (3 * heads + 4 * kv_heads) * narrow
    mlp = config.intermediate_size * (3 * narrow + wide)
    in_layer = shape.step_tokens * (hidden + max(attention, mlp))
    in_layer += attention_parts(config, shape.max_num_seqs)
    in_head = shape.max_num_seqs * config.vocab_size * 2 * wide + shape.step_tokens * config.hidden_size * narrow
    return max(in_layer, in_head) + CONTEXT_BYTES


def attention_parts(config: LlamaConfig, num_sequences: int) -> int:
    """Bytes of the splits' results that decode attention adds up: twice as many where drafts have several rows."""
    numbers = config.num_attention_heads * (config.head_dim + 1) * _MOST_SPLITS
    return 2 * num_sequences * numbers * _FLOAT_BYTES


def estimate_graphs(config: LlamaConfig, shape: ServingShape, dtype: torch.dtype) -> int:
    """Bytes of all recorded steps: a pool as large as the largest step needs, logits of each, what the driver keeps."""
    if not shape.graph_sizes:
        return 0
    largest = ServingShape(max(shape.graph_sizes), max(shape.graph_sizes))
    pool = estimate_workspace(config, largest, dtype) - CONTEXT_BYTES
    logits = sum(shape.graph_sizes) * config.vocab_size * _FLOAT_BYTES * shape.num_graphs
    return pool + logits + GRAPH_BYTES * len(shape.graph_sizes) * shape.num_graphs


def block_bytes(config: LlamaConfig, cache_dtype: torch.dtype) -> int:
    """Bytes of one block of 16 tokens of the paged cache, in all layers."""
    return PagedKVCache.bytes_per_block(config, BLOCK_SIZE, cache_dtype)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """How a network would be served on a card.

    memory:     what the card's memory is given to
    total:      all of the card's memory
    kv_tokens:  tokens that the key-value cache holds
    """

    memory: DeviceMemory
    total: int
    kv_tokens: int

    def to_dict(self) -> dict[str, int]:
        """Plain dict for JSON."""
        parts = {f"{kind}_bytes": size for kind, size in self.memory.by_kind().items()}
        sums = {"device_memory_bytes": self.total, "budget_bytes": self.memory.budget}
        return {**sums, **parts, "kv_tokens": self.kv_tokens}


def plan_serving(
    config: LlamaConfig,
    weights: int,
    shape: ServingShape,
    *,
    total: int,
    utilization: float,
    cache_dtype: torch.dtype = torch.bfloat16,
) -> ServingPlan:
    """The plan that a server would make on a card with ``total`` bytes, workspace and graphs computed.

    Args:
        config: the network's shape.
        weights: bytes of its parameters on the card.
        shape: how much is served at a time.
        total: the card's memory.
        utilization: share of it that may be taken.
        cache_dtype: of the key-value cache; activations are bfloat16.

    Raises:
        QerveError: no key-value cache fits beside the rest.
    """
    size = block_bytes(config, cache_dtype)
    memory = plan_memory(
        int(total * utilization),
        weights=weights,
        workspace=estimate_workspace(config, shape, torch.bfloat16),
        graphs=estimate_graphs(config, shape, torch.bfloat16),
        bytes_per_block=size,
    )
    return ServingPlan(memory, total, (memory.kv_cache // size - 1) * BLOCK_SIZE)


def weight_bytes(component_bytes: Mapping[str, int], codes: Iterable[tuple[int, int]]) -> int:
    """Bytes of the parameters on a card: as stored, but for codes of 5 to 7 bits, which take 8 there.

    Args:
        component_bytes: stored bytes by component.
        codes: per linear layer, the number of its weights and the bits of one.
    """
    widened = sum(num_weights * (8 - num_bits) for num_weights, num_bits in codes if 4 < num_bits < 8)
    return sum(component_bytes.values()) + widened // 8
