"""The bench on a GPU: single layers beside libraries, the engine end to end, all as shares of the card's limits."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.artifact.execution import RunOptions
from models.artifact.format import qerve_version
from models.artifact.load import load_artifact
from models.bench.aims import aims
from models.bench.cards import Card
from models.bench.contenders import Contender, contenders
from models.bench.device_clock import CudaClock, DeviceClock
from models.bench.gpu_peaks import PeakSizes, card_here, gpu_peak_probes
from models.bench.layer_times import LayerBench, distinct_shapes
from models.bench.probe import Probe, Samples, run_rounds
from models.bench.random_model import SHAPES
from models.bench.random_network import random_network, step_bytes
from models.bench.report import Limit, Report
from models.bench.roofline import BATCH_SIZES, Cost, Shape
from models.errors import QerveError
from models.llama.attention_choice import choose_attention
from models.llama.cuda_graphs import CudaGraphDevice
from models.llama.decode_graphs import GraphDevice, graph_sizes
from models.llama.kv_cache import PagedKVCache
from models.llama.model import LlamaForCausalLM
from models.llama.network import KVCache, Network
from models.llama.paged_network import PagedLlama

from ..engine.engine import EngineTokenizer
from .engine import EngineBench, PlainTexts, num_blocks_for
from .options import BATCH_SIZES as SEQUENCES
from .options import BenchOptions

Progress = Callable[[int, int], None]
AIMED_AT = "llama-2-7b"
"""The network that the aim of decoding is about."""


@dataclass(frozen=True, slots=True)
class GpuSubject:
    """What runs end to end."""

    name: str
    network: Network
    tokenizer: EngineTokenizer


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """Where and on what is measured; tests put other things there.

    card_name: as the driver calls it
    properties: with ``total_memory`` and ``L2_cache_size``
    recorder:  makes what records decode steps
    """

    device: torch.device
    clock: DeviceClock
    card_name: str
    properties: Any
    shapes: Sequence[Shape]
    batch_sizes: Sequence[int]
    contenders: Sequence[Contender]
    peaks: PeakSizes
    recorder: Callable[[torch.device], GraphDevice] = CudaGraphDevice

    @classmethod
    def of(cls, device: torch.device, rank: int) -> "GpuPlace":
        """A CUDA device, all shapes and contenders."""
        return cls(
            device,
            CudaClock(device),
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_properties(device),
            distinct_shapes(),
            BATCH_SIZES,
            contenders(rank),
            PeakSizes(),
        )


def cuda_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        QerveError: no such device is here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QerveError(f"--device {name}: choose cpu, cuda or cuda:N") from error
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "this PyTorch is built without CUDA" if built is None else f"CUDA {built} finds no GPU and driver"
        raise QerveError(f"--device {name}: {reason}; install one with CUDA, or measure on the CPU with --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise QerveError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, the first is cuda:0")
    return torch.device("cuda", device.index or 0)


def gpu_subject(
    artifact: Path | None, random: str | None, rank: int, options: RunOptions, device: torch.device
) -> GpuSubject | None:
    """An artifact or a random network on ``device``; None: neither was asked for.

    Raises:
        QerveError: there is no such artifact or shape.
    """
    if artifact is not None:
        if not artifact.is_dir():
            raise QerveError(f"{artifact}: there is no such directory; make an artifact with `qerve build`")
        loaded = load_artifact(artifact, device, options=options)
        return GpuSubject(artifact.resolve().name, loaded.model, loaded.tokenizer)
    if random is None:
        return None
    if random not in SHAPES:
        raise QerveError(f"--random {random}: choose of {', '.join(SHAPES)}")
    layers = random_network(SHAPES[random], rank, device, torch.bfloat16)
    network = PagedLlama(layers, choose_attention(layers.config, device, layers.dtype))
    return GpuSubject(f"{random}, random weights, W4 group 64, rank {rank}", network, PlainTexts())


class GpuBench:
    """Measures ``place``, and ``subject`` end to end where there is one."""

    def __init__(self, place: GpuPlace, subject: GpuSubject | None, options: BenchOptions) -> None:
        self._place = place
        self._subject = subject
        self._options = options
        self._missing: dict[str, str] = {}

    def run(self, progress: Progress = lambda done, total: None) -> Report:
        """Measure in rounds; what cannot be measured is reported as missing."""
        options, place = self._options, self._place
        with torch.inference_mode():
            peaks = list(gpu_peak_probes(place.device, place.clock, place.peaks))
            samples = run_rounds([*peaks, *self._speeds()], options.repeats)
            card = card_here(place.card_name, samples, place.properties)
            layers = LayerBench(place.contenders, place.shapes, place.batch_sizes, place.device, place.clock)
            if "kernels" in options.sections:
                measured = layers.run(options.repeats, progress)
                samples.failed |= measured.failed
                samples.values |= measured.values
                samples.units |= measured.units
        limits = self._limits(samples, card)
        rows = layers.times(samples, card)
        report = Report(
            self._about(card), samples, self._workloads(), limits=limits, missing=self._missing, layers=rows
        )
        is_aimed_at = self._subject is not None and self._subject.name.startswith(AIMED_AT)
        decode = report.limit_share(options.workload.decode(1)) if is_aimed_at else None
        return replace(report, aims=aims(rows, decode))

    def _speeds(self) -> Iterator[Probe]:
        subject, options = self._subject, self._options
        sizes = [1] if "decode" in options.sections else []
        sizes += list(SEQUENCES) if "batch" in options.sections else []
        if subject is None:
            self._missing["decode, prefill"] = "give an artifact, or --random SHAPE"
            return
        if not sizes and "prefill" not in options.sections:
            return
        cache = subject.network.new_cache(num_blocks_for(options.workload, max([*sizes, 1])))
        self._record(subject.network, cache, [*sizes, 1])
        bench = EngineBench(subject.network, cache, subject.tokenizer, options.workload, meter=None)
        yield from (bench.decode_probe(size) for size in sizes)
        if "prefill" in options.sections:
            yield bench.prefill_probe()

    def _record(self, network: Network, cache: KVCache, sizes: Sequence[int]) -> None:
        """Record decode steps as a server does; without, they run kernel by kernel, and the report says why."""
        if not isinstance(network, PagedLlama) or not isinstance(cache, PagedKVCache):
            return
        reason = network.graphs_obstacle
        try:
            if reason is None:
                recorder = self._place.recorder(self._place.device)
                longest = self._options.workload.longest
                network.record_decodes(cache, graph_sizes(max(sizes)), longest, recorder, has_ranks=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason is not None:
            self._missing["decode graphs"] = reason

    def _workloads(self) -> list[str]:
        work = self._options.workload
        return [*(work.decode(size) for size in (1, *SEQUENCES)), work.prefill]

    def _limits(self, samples: Samples, card: Card) -> dict[str, Limit]:
        """Weights are read once a step, and multiplied with every token; attention is not counted."""
        network, work = None if self._subject is None else self._subject.network, self._options.workload
        network = network.layers if isinstance(network, PagedLlama) else network
        if not isinstance(network, LlamaForCausalLM):
            return {}
        weights = sum(it.in_features * it.out_features for it in network.config.linear_shapes().values())
        head = network.config.vocab_size * network.config.hidden_size
        rows = {work.decode(size): (size, size) for size in (1, *SEQUENCES)} | {work.prefill: (work.prefill_len, 1)}
        return {
            name: Limit(
                Cost(step_bytes(network), 2.0 * (weights * num_rows + head * num_logits)).seconds(card), num_rows
            )
            for name, (num_rows, num_logits) in rows.items()
            if name in samples.values
        }

    def _about(self, card: Card) -> dict[str, str]:
        place, work = self._place, self._options.workload
        return {
            "card": place.card_name,
            "limits": f"{card.bandwidth / 1e9:.0f} GB/s, {card.bf16 / 1e12:.0f} bf16 and {card.int8 / 1e12:.0f} int8 "
            f"Tops/s ({card.source})",
            "network": "none" if self._subject is None else self._subject.name,
            "workload": f"decoding from context {work.prompt_len} to {work.prompt_len + work.num_steps}, "
            f"prompt of {work.prefill_len} tokens, rounds: {self._options.repeats}",
            "versions": f"qerve {qerve_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
            f"triton {_version('triton')}, Python {platform.python_version()}",
        }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
