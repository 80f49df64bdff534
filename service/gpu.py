"""Serving on a GPU: its memory is divided before anything is allocated, and decode steps are recorded at the end."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from models.errors import QerveError
from models.llama.batch import Batch, SequenceSpan, TokenBatch
from models.llama.cuda_graphs import CudaGraphDevice
from models.llama.decode_graphs import GraphDevice, graph_sizes
from models.llama.device_memory import (
    CONTEXT_BYTES,
    DeviceMemory,
    ServingShape,
    attention_parts,
    estimate_graphs,
    plan_memory,
)
from models.llama.kv_cache import PagedKVCache
from models.llama.network import Network
from models.llama.paged_network import PagedLlama

from .engine.capacity import CacheLimits, step_tokens
from .metrics import Metrics
from .settings import Settings

logger = logging.getLogger("qerve.server")

_MIB = 1 << 20


class DeviceGauge(Protocol):
    """Memory of one card."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        ...

    @property
    def free_bytes(self) -> int:
        """What nobody has taken."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """What tensors of this process hold."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """What ``run`` holds at most beyond ``allocated_bytes``."""
        ...


class CudaGauge:
    """Reads PyTorch's allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total_bytes(self) -> int:
        """See ``DeviceGauge``."""
        return torch.cuda.mem_get_info(self._device)[1]

    @property
    def free_bytes(self) -> int:
        """See ``DeviceGauge``; with what PyTorch keeps for later."""
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + kept

    @property
    def allocated_bytes(self) -> int:
        """See ``DeviceGauge``."""
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """See ``DeviceGauge``."""
        before = self.allocated_bytes
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return peak - before


class GpuServing:
    """One network on one card.

    memory: what the card's memory is given to
    rows:   name -> value, how decode steps run; changes when recording fails
    """

    def __init__(self, model: PagedLlama, settings: Settings, gauge: DeviceGauge, *, has_ranks: bool) -> None:
        self._model = model
        self._has_ranks = has_ranks
        tokens = step_tokens("cuda", settings.max_num_seqs, settings.max_num_batched_tokens)
        obstacle = model.graphs_obstacle if settings.cuda_graphs else "turned off"
        sizes = () if obstacle else graph_sizes(settings.max_num_seqs, settings.cuda_graph_sizes)
        self._shape = ServingShape(settings.max_num_seqs, tokens, sizes, 1 + has_ranks)
        self.rows = {"decode graphs": f"none: {obstacle}" if obstacle else f"batch sizes {', '.join(map(str, sizes))}"}
        self.memory = self._plan(settings, gauge)

    def limits(self, settings: Settings) -> CacheLimits:
        """For ``plan_cache``: the blocks of the plan but the scratch block."""
        usable = self.memory.kv_cache - self._model.cache_block_bytes
        return CacheLimits(settings.max_num_seqs, settings.max_model_len, usable, fills_memory=True)

    @torch.inference_mode()
    def _warm_up(self, kv_cache: PagedKVCache) -> None:
        """Steps of every size, so that kernels are compiled before there are requests; nobody has blocks yet."""
        counts = [1 << exponent for exponent in range(self._shape.step_tokens.bit_length())]
        table = list(range(kv_cache.num_blocks))
        for count in counts:
            if count <= kv_cache.num_slots:
                span = SequenceSpan(0, count, count, None, table)
                self._model.step(TokenBatch([0] * count, [span], [count - 1]), kv_cache)

    def record(self, kv_cache: PagedKVCache, max_context: int, device: GraphDevice | None = None) -> None:
        """Record decode steps over ``kv_cache``; a device that cannot leaves them to run as they are.

        Args:
            kv_cache: one of the network's.
            max_context: tokens of the longest sequence.
            device: records; None: the network's card.
        """
        self._warm_up(kv_cache)
        if not self._shape.graph_sizes:
            return
        recorder = device or CudaGraphDevice(self._model.device)
        try:
            self._model.record_decodes(
                kv_cache, self._shape.graph_sizes, max_context, recorder, has_ranks=self._has_ranks
            )
        except RuntimeError as error:
            self.rows["decode graphs"] = f"none: recording failed: {error}"
            logger.warning("decode steps are not recorded, and run kernel by kernel: %s", error)
            return
        log = logger.warning if recorder.num_bytes > self.memory.graphs else logger.info
        taken, planned = recorder.num_bytes / _MIB, self.memory.graphs / _MIB
        log("recorded decode steps take %.1f MiB, %.1f MiB were set aside", taken, planned)

    def _plan(self, settings: Settings, gauge: DeviceGauge) -> DeviceMemory:
        model, asked = self._model, settings.kv_cache_memory
        block_bytes = model.cache_block_bytes
        weights = gauge.allocated_bytes
        parts = attention_parts(model.config, settings.max_num_seqs)
        workspace = gauge.peak_bytes(self._largest_step) + parts + CONTEXT_BYTES
        graphs = estimate_graphs(model.config, self._shape, model.dtype)
        budget = int(gauge.total_bytes * settings.gpu_memory_utilization)
        max_blocks = None if asked is None else asked // block_bytes
        memory = plan_memory(
            budget,
            weights=weights,
            workspace=workspace,
            graphs=graphs,
            bytes_per_block=block_bytes,
            max_blocks=max_blocks,
        )
        still_needed = memory.kv_cache + graphs + workspace - CONTEXT_BYTES
        if still_needed > gauge.free_bytes:
            raise QerveError(
                f"gpu_memory_utilization {settings.gpu_memory_utilization:g} needs {still_needed // _MIB} MiB more "
                f"on {model.device}, {gauge.free_bytes // _MIB} MiB are free: lower it, or free what others hold"
            )
        return memory

    @torch.inference_mode()
    def _largest_step(self) -> None:
        """A prompt that fills a step, and logits for as many rows as sequences run."""
        model, shape = self._model, self._shape
        hidden = model(Batch.uncached([[0] * shape.step_tokens], model.device))
        model.logits(hidden[: shape.max_num_seqs])


def add_device_memory(metrics: Metrics, memory: DeviceMemory) -> None:
    """A gauge of what the card's memory is given to."""
    readings = [({"kind": kind}, float(size)) for kind, size in memory.by_kind().items()]
    metrics.add_constants("device_memory_plan_bytes", "What the GPU's memory is given to, all that may be", readings)


def gpu_serving(model: Network, settings: Settings, rank: int) -> GpuServing | None:
    """What serving ``model``, whose corrections have up to ``rank`` components, needs of its card; None: it has none.

    Raises:
        QerveError: the card's memory is not enough.
    """
    if not isinstance(model, PagedLlama) or model.device.type != "cuda":
        return None
    return GpuServing(model, settings, CudaGauge(model.device), has_ranks=rank > 0)
