"""All probes of one bench, in rounds, and what follows from them."""

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from models.artifact.format import qerve_version
from models.bench.llama import LLAMA, LlamaBench
from models.bench.machine import NoiseMeter, load_average, processor_name
from models.bench.operators import INPUTS, OPERATORS, OperatorBench, Phase, Work, step_work
from models.bench.peaks import READ, multiply_metric, peak_probes, read_buffer
from models.bench.probe import Probe, ProbeError, Samples, run_rounds
from models.bench.random_model import check_memory
from models.bench.report import ENGINE, RANK_0, Limit, OperatorTime, Report
from models.bench.strips import matrices_of
from models.errors import QerveError
from models.llama.native import NativeLlama

from .engine import EngineBench, num_blocks_for
from .http import http_metric, http_probe
from .options import BATCH_SIZES, STREAMS, BenchOptions
from .subject import Subject

Progress = Callable[[int, int], None]
_DECODE_ITERATIONS = 16


class Bench:
    """The probes of ``subject`` that ``options`` asks for."""

    def __init__(self, subject: Subject, options: BenchOptions) -> None:
        self._subject = subject
        self._options = options
        self._missing: dict[str, str] = {}
        self._operators: list[OperatorBench] = []
        self._llama: LlamaBench | None = None
        self._stack = ExitStack()
        self._read = torch.empty(0, dtype=torch.uint8)

    def run(self, progress: Progress = lambda done, total: None) -> Report:
        """Measure in rounds; what cannot be measured is reported as missing."""
        load = load_average()
        with self._stack, torch.inference_mode():
            probes = [*self._peaks(), *self._speeds(), *self._http(), *self._kernels()]
            if not probes:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self._missing.items())
                raise QerveError(f"there is nothing to measure: {reasons}")
            noise = NoiseMeter()
            samples = run_rounds(probes, self._options.repeats, progress)
            about = self._about(load, noise)
        streams = (_engine_streams(), http_metric(STREAMS)) if http_metric(STREAMS) in samples.values else None
        return Report(
            about,
            samples,
            self._workloads(),
            streams,
            self._limits(samples),
            self._operator_times(samples),
            self._missing,
        )

    def _peaks(self) -> Iterator[Probe]:
        meter, network = self._subject.meter, self._subject.network
        if meter is None or not isinstance(network, NativeLlama):
            self._missing["peaks"] = self._subject.unmeasured or ""
            return
        self._read = read_buffer(sum(matrix.nbytes for matrix in matrices_of(network.weights)))
        yield from peak_probes(meter, self._read)

    def _speeds(self) -> Iterator[Probe]:
        """Engine at full rank, at rank 0 and llama.cpp one after the other, workload by workload."""
        sizes = self._decode_sizes()
        if not sizes and "prefill" not in self._options.sections:
            return
        self._open_llama()
        benches = self._engine_benches(sizes)
        for size in sizes:
            yield from (bench.decode_probe(size) for bench in benches)
            if self._llama is not None and size in {1, BATCH_SIZES[0]}:
                yield self._llama.decode_probe(size)
        if "prefill" in self._options.sections:
            yield from (bench.prefill_probe() for bench in benches)
            if self._llama is not None:
                yield self._llama.prefill_probe()
        if "batch" in self._options.sections:
            yield benches[0].mixed_probe()

    def _http(self) -> Iterator[Probe]:
        if "http" not in self._options.sections:
            return
        loaded = self._subject.loaded
        if loaded is None:
            self._missing["http"] = "a server needs an artifact"
            return
        (bench, *_) = self._engine_benches([STREAMS])
        yield bench.whole_probe(STREAMS, _engine_streams())
        try:
            yield self._stack.enter_context(http_probe(loaded, self._options.workload, STREAMS))
        except ProbeError as error:
            self._missing["http"] = str(error)

    def _kernels(self) -> Iterator[Probe]:
        if "kernels" not in self._options.sections:
            return
        network = self._subject.network
        if not isinstance(network, NativeLlama):
            self._missing["kernels"] = self._subject.unmeasured or ""
            return
        for phase in self._phases():
            bench = OperatorBench(network, phase, self._read)
            self._operators.append(bench)
            yield from bench.probes()

    def _decode_sizes(self) -> list[int]:
        sections = self._options.sections
        sizes = ([1] if "decode" in sections else []) + (list(BATCH_SIZES) if "batch" in sections else [])
        block_bytes = self._subject.network.cache_block_bytes
        for size in tuple(sizes):
            num_bytes = num_blocks_for(self._options.workload, size) * block_bytes
            try:
                check_memory(num_bytes, f"the key-value cache of {size} sequences")
            except QerveError as error:
                self._missing[self._options.workload.decode(size)] = str(error)
                sizes.remove(size)
        return sizes

    def _engine_benches(self, sizes: list[int]) -> list[EngineBench]:
        subject, work = self._subject, self._options.workload
        num_sequences = max([*sizes, BATCH_SIZES[0]])
        cache = subject.network.new_cache(num_blocks_for(work, num_sequences))
        benches = [EngineBench(subject.network, cache, subject.tokenizer, work, meter=subject.meter)]
        if subject.bare is not None:
            benches.append(EngineBench(subject.bare, cache, subject.tokenizer, work, meter=subject.meter, label=RANK_0))
        return benches

    def _open_llama(self) -> None:
        options, llama = self._options, self._options.llama
        if llama is None:
            return
        try:
            self._llama = LlamaBench(llama, options.workload, self._num_threads(), BATCH_SIZES[0])
        except ProbeError as error:
            self._missing[LLAMA] = str(error)
        else:
            self._stack.enter_context(self._llama.worker)

    def _num_threads(self) -> int:
        meter = self._subject.meter
        return meter.num_threads if meter is not None else self._options.threads or torch.get_num_threads()

    def _phases(self) -> list[Phase]:
        work = self._options.workload
        context = work.prompt_len + max(1, work.num_steps // 2)
        decoding = [Phase(work.decode(size), size, 1, context, _DECODE_ITERATIONS) for size in (1, BATCH_SIZES[0])]
        return [*decoding, Phase(work.prefill, 1, work.prefill_len, work.prefill_len, 2)]

    def _workloads(self) -> list[str]:
        work = self._options.workload
        return [*(work.decode(size) for size in (1, *BATCH_SIZES)), work.prefill, "mixed"]

    def _peak_speeds(self, samples: Samples) -> tuple[float, float] | None:
        """Bytes and multiply-adds per second at most."""
        meter = self._subject.meter
        read = samples.median(READ)
        multiply = None if meter is None else samples.median(multiply_metric(meter.isa))
        return None if read is None or multiply is None else (read, multiply)

    def _limits(self, samples: Samples) -> dict[str, Limit]:
        peaks, network, work = self._peak_speeds(samples), self._subject.network, self._options.workload
        if peaks is None or not isinstance(network, NativeLlama):
            return {}
        rows = {work.decode(size): (size, size) for size in (1, *BATCH_SIZES)} | {work.prefill: (work.prefill_len, 1)}
        return {
            name: Limit(step_work(network.weights, *counts).least_seconds(*peaks), counts[0])
            for name, counts in rows.items()
            if name in samples.values
        }

    def _operator_times(self, samples: Samples) -> list[OperatorTime]:
        peaks = self._peak_speeds(samples)
        rows = []
        for bench in self._operators:
            for operator in (*OPERATORS, INPUTS):
                seconds = samples.median(bench.metric(operator))
                if seconds is not None:
                    rows.append(_operator_time(bench.phase.name, operator, seconds, bench.work(operator), peaks))
        return rows

    def _about(self, load: float, noise: NoiseMeter) -> dict[str, str]:
        meter, work = self._subject.meter, self._options.workload
        heard = noise.read()
        about = {
            "network": self._subject.name,
            "processor": processor_name(),
            "threads": str(self._num_threads()),
            "workload": f"decoding from context {work.prompt_len} to {work.prompt_len + work.num_steps}, "
            f"prompt of {work.prefill_len} tokens, rounds: {self._options.repeats}",
            "versions": f"qerve {qerve_version()}, torch {torch.__version__}, Python {platform.python_version()}",
            "load average": f"{load:.2f} at the start; processors busy elsewhere meanwhile: {heard.others:.2f}, "
            f"stolen: {heard.stolen:.2f}",
        }
        if meter is not None:
            about["instruction set"] = f"{meter.isa} (of {', '.join(meter.library.compiled_isas)})"
        if self._llama is not None:
            about[LLAMA] = self._llama.description
        return about


def _engine_streams() -> str:
    return f"{STREAMS} streams, {ENGINE}"


def _operator_time(
    phase: str, operator: str, seconds: float, work: Work | None, peaks: tuple[float, float] | None
) -> OperatorTime:
    if work is None or peaks is None:
        return OperatorTime(phase, operator, seconds)
    return OperatorTime(
        phase,
        operator,
        seconds,
        work.num_bytes,
        work.multiply_adds,
        work.num_bytes / seconds / peaks[0],
        work.multiply_adds / seconds / peaks[1],
    )
