"""What is read when it is scraped: memory of the process, state of the engine and its cache, the served model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from models.artifact.format import qerve_version
from models.artifact.load import LoadedModel
from models.llama.network import KVCache

from .. import memory
from ..engine.async_engine import AsyncEngine
from ..engine.block_manager import BlockManager
from ..engine.scheduler import Scheduler
from ..memory_account import MemoryAccount
from ..model_info import ModelInfo
from ..version import git_sha
from .registry import Read, Reading

if TYPE_CHECKING:
    from ..deps import Context

WEIGHT_COMPONENTS = {"lora_down": "lowrank_a", "lora_up": "lowrank_b"}
"""Manifest component -> label value: x passes through A (down) first, then B (up), as LoRA calls them."""

Register = Callable[[str, Read], None]


def read_process(register: Register) -> None:
    """Memory of the process, its control group and its GPUs."""
    register("process_memory_bytes", lambda: _by("kind", memory.process_memory()))
    register("cgroup_memory_bytes", lambda: _by("kind", memory.cgroup_memory()))
    register("oom_headroom_bytes", lambda: [({}, memory.oom_headroom_bytes())])
    register("cuda_memory_bytes", _cuda_memory)


def read_engine(register: Register, engine: AsyncEngine, scheduler: Scheduler) -> None:
    """The queue of ``engine``, and how fast it is."""
    admission = engine.admission
    register("num_requests_running", lambda: _one(engine.num_running))
    register("num_requests_waiting", lambda: _one(len(scheduler.waiting)))
    register(
        "num_requests_waiting_by_reason",
        lambda: _by("reason", {"capacity": len(scheduler.waiting), "deferred": engine.num_deferred}),
    )
    register("queue_depth", lambda: _one(len(scheduler.waiting) + engine.num_deferred))
    register("queue_capacity", lambda: _one(admission.capacity - scheduler.max_num_seqs))
    register("num_queued_tokens", lambda: _one(admission.num_queued_tokens))
    register("throughput_tokens_per_second", lambda: _one(engine.throughput.tokens_per_second))


def read_cache(register: Register, cache: KVCache, scheduler: Scheduler, cache_dtype: str) -> None:
    """How much of the key-value ``cache`` is in use."""
    blocks, block_bytes = scheduler.blocks, cache.nbytes / scheduler.blocks.num_blocks
    config = {
        "block_size": str(blocks.block_size),
        "num_gpu_blocks": str(blocks.num_blocks),
        "cache_dtype": cache_dtype,
        "enable_prefix_caching": str(blocks.has_prefix_cache),
    }

    def numbers_of_blocks() -> dict[str, int]:
        return {
            "capacity": blocks.num_blocks,
            "used": blocks.num_used_blocks,
            "cached": blocks.num_cached_blocks,
            "reserved": _num_reserved_blocks(scheduler, blocks),
        }

    register("kv_cache_usage_perc", lambda: _one(blocks.usage))
    register(
        "kv_cache_bytes",
        lambda: _by("kind", {kind: block_bytes * number for kind, number in numbers_of_blocks().items()}),
    )
    register("cache_config_info", lambda: [(config, 1)])


def read_account(register: Register, account: MemoryAccount) -> None:
    """What the resident memory of the process is for."""
    register("memory_component_bytes", lambda: _by("component", account.components()))


def read_context(register: Register, context: "Context") -> None:
    """Whether requests may come, what rank they get, and the model that they get it of."""
    engine, ranks = context.engine, context.ranks
    register("ready", lambda: _one(context.problem is None))
    register("elastic_rank", lambda: _one(ranks.rank_at(engine.num_waiting)))
    register("elastic_rank_full", lambda: _one(ranks.full))
    _read_model(register, context.loaded, context.info)


def _read_model(register: Register, loaded: LoadedModel, info: ModelInfo) -> None:
    """What never changes about the served model."""
    manifest = loaded.manifest
    scheme = info.schemes[0] if info.schemes else {}
    labels = {
        "version": qerve_version(),
        "git_sha": git_sha(),
        "kernel": ",".join(sorted(info.backends)),
        "artifact_sha256": manifest.manifest_sha256,
        "method": manifest.build.reconstruct.method,
        "scheme": f"w{scheme.get('num_bits', 16)}g{scheme.get('group_size', -1)}",
        "rank": str(info.rank),
    }
    stored = {WEIGHT_COMPONENTS.get(name, name): size for name, size in loaded.weight_bytes.items()}
    register("build_info", lambda: [(labels, 1)])
    register("model_weight_bytes", lambda: _by("component", stored))
    register("model_resident_bytes", lambda: _by("backend", loaded.resident_bytes))
    register("model_effective_bits_per_weight", lambda: _one(manifest.effective_bits))
    register("model_load_seconds", lambda: _one(loaded.load_seconds))


def _num_reserved_blocks(scheduler: Scheduler, blocks: BlockManager) -> int:
    """Blocks that running sequences do not hold yet and will, if they use up their ``max_tokens``."""
    running = list(scheduler.running)
    wanted = (blocks.num_blocks_for(request.num_reserved_tokens) - len(request.block_table) for request in running)
    return sum(max(0, number) for number in wanted)


def _cuda_memory() -> list[Reading]:
    return [({"device": str(device), "kind": kind}, size) for (device, kind), size in memory.cuda_memory().items()]


def _by(label: str, values: dict[str, int] | dict[str, float]) -> list[Reading]:
    return [({label: name}, value) for name, value in values.items()]


def _one(value: float) -> list[Reading]:
    return [({}, value)]
