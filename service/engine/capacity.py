"""How many tokens the key-value cache holds, how long a sequence may therefore be, and how many tokens a step takes."""

from dataclasses import dataclass

from models.errors import QerveError
from models.llama.config import LlamaConfig

from .block_manager import BLOCK_SIZE

_GIB = 1 << 30
MAX_DEFAULT_BYTES = {"cpu": 4 * _GIB, "cuda": 64 * _GIB}
AVAILABLE_SHARE = {"cpu": 0.3, "cuda": 0.7}
"""Of the memory that is free after loading: the rest is for activations, and on a CPU for everybody else.

Where a plan of the device's memory says what the cache gets, neither counts. All of what is taken
fills up in time, since blocks are remembered until others need them.
"""
DEFAULT_STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""Of one step: enough that the matrix products are compute-bound, few enough that decodes beside them wait little."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """num_blocks: blocks to allocate; max_model_len: longest sequence, prompt and output together."""

    num_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """What the operator asked for; None: decide from the model and the memory that is available.

    fills_memory: take all of ``memory_bytes``, also where ``max_num_seqs`` need less: the rest remembers prefixes
    """

    max_num_seqs: int
    max_model_len: int | None = None
    memory_bytes: int | None = None
    fills_memory: bool = False


def plan_cache(
    config: LlamaConfig, bytes_per_block: int, device_type: str, available_bytes: int, limits: CacheLimits
) -> CachePlan:
    """A cache that lets ``max_num_seqs`` sequences of full length run, as far as memory allows.

    With less, sequences run as long as there are blocks for what they hold, and take turns beyond that.

    Raises:
        QerveError: the length or the memory asked for cannot be had, with what to change.
    """
    context = config.max_position_embeddings
    if limits.max_model_len is not None and limits.max_model_len > context:
        raise QerveError(f"max_model_len {limits.max_model_len} is more than the model's context of {context} tokens")
    wanted_len = limits.max_model_len or context
    blocks_per_sequence = -(-wanted_len // BLOCK_SIZE)
    budget = limits.memory_bytes
    if budget is None:
        budget = min(MAX_DEFAULT_BYTES[device_type], int(available_bytes * AVAILABLE_SHARE[device_type]))
    num_blocks = budget // bytes_per_block
    if not limits.fills_memory:
        num_blocks = min(num_blocks, blocks_per_sequence * limits.max_num_seqs)
    if num_blocks < blocks_per_sequence and (limits.max_model_len is not None or num_blocks < 1):
        raise QerveError(
            f"{budget} bytes of key-value cache hold {num_blocks * BLOCK_SIZE} tokens, one sequence of {wanted_len} "
            f"needs {blocks_per_sequence * bytes_per_block} bytes: raise kv_cache_memory or lower max_model_len"
        )
    return CachePlan(num_blocks, min(wanted_len, num_blocks * BLOCK_SIZE))


def step_tokens(device_type: str, max_num_seqs: int, asked: int | None) -> int:
    """Token budget of one step; ``asked`` None: the device's default, more where ``max_num_seqs`` needs it.

    Raises:
        QerveError: beside one decode of every sequence no block of a prompt would fit, so that prompts could starve.
    """
    least = max_num_seqs + BLOCK_SIZE
    if asked is None:
        return max(DEFAULT_STEP_TOKENS[device_type], least)
    if asked < least:
        raise QerveError(
            f"max_num_batched_tokens {asked} leaves no room for a prompt beside {max_num_seqs} decodes: "
            f"make it at least {least}, or lower max_num_seqs"
        )
    return asked
