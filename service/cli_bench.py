"""``qerve bench``: how fast an artifact runs here, as fractions of what the machine can do and beside llama.cpp."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from models.errors import QerveError

if TYPE_CHECKING:
    from models.artifact.execution import RunOptions
    from models.bench.report import Report

    from .bench.options import BenchOptions

EXAMPLE = "qerve bench artifacts/smollm2-w4 --only decode,prefill --against llama.cpp --gguf smollm2.Q4_0.gguf"


def bench(
    artifact: Annotated[Path | None, typer.Argument(help="Artifact directory, as `qerve build` wrote it.")] = None,
    *,
    only: Annotated[
        str | None, typer.Option(help="Sections: kernels, decode, prefill, batch, http, with commas. [default: all]")
    ] = None,
    random: Annotated[
        str | None, typer.Option(help="Instead of an artifact, random weights: tinyllama-1.1b, llama-2-7b.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Of the low-rank terms of random weights.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, or cuda, cuda:N: single layers beside libraries too.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the kernels. [default: one per core]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 5,
    kv_cache_dtype: Annotated[
        Literal["auto", "fp16", "int8"], typer.Option(help="Keys and values; auto: fp16.")
    ] = "auto",
    activations: Annotated[
        Literal["auto", "8", "16"], typer.Option(help="Native kernels round inputs to as many bits; auto: 8.")
    ] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Context before decoding.")] = 16,
    decode_steps: Annotated[int, typer.Option(min=1, help="Tokens decoded per sequence.")] = 128,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt of the prefill.")] = 512,
    against: Annotated[Literal["llama.cpp"] | None, typer.Option(help="Measure this in the same rounds.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The model for --against, best as Q4_0.")] = None,
    llama_python: Annotated[
        str, typer.Option(help="Interpreter that has llama-cpp-python. [default: this one]")
    ] = sys.executable,
    llama_no_repack: Annotated[
        bool, typer.Option("--llama-no-repack", help="llama.cpp leaves its weights as the file has them: slower.")
    ] = False,
    allow_noise: Annotated[bool, typer.Option("--allow-noise", help="Measure though other processes run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and no tables.")] = False,
) -> None:
    """Measure how fast an artifact runs here, beside the machine's own limits."""
    from models.artifact.execution import RunOptions
    from models.bench.llama import LlamaOptions
    from models.bench.workload import Workload

    from .bench.options import BenchOptions, parse_sections

    _check_subjects(artifact, random, against, gguf, device)
    llama = None if gguf is None else LlamaOptions(gguf, llama_python, not llama_no_repack)
    workload = Workload(prompt_tokens, decode_steps, prefill_tokens)
    options = BenchOptions(parse_sections(only), repeats, threads, workload, llama)
    choices = RunOptions("auto", activations, kv_cache_dtype)
    if device == "cpu":
        report = _bench_cpu(artifact, random, rank=rank, run=choices, options=options, allow_noise=allow_noise)
    else:
        report = _bench_gpu(device, artifact, random, rank=rank, run=choices, options=options)
    _print(report, as_json=as_json)


def _bench_cpu(
    artifact: Path | None,
    random: str | None,
    *,
    rank: int,
    run: "RunOptions",
    options: "BenchOptions",
    allow_noise: bool,
) -> "Report":
    """The bench on the processor."""
    from models.bench.machine import check_quiet, load_average
    from models.cli_output import progress_bar

    from .bench.run import Bench
    from .bench.subject import artifact_subject, random_subject

    check_quiet(load_average(), allow_noise=allow_noise)
    if artifact is not None:
        subject = artifact_subject(artifact, run, options.threads)
    else:
        with progress_bar("random weights") as progress:
            subject = random_subject(random or "", rank, run, options.threads, progress)
    with progress_bar("measuring") as progress:
        return Bench(subject, options).run(progress)


def _bench_gpu(
    name: str,
    artifact: Path | None,
    random: str | None,
    *,
    rank: int,
    run: "RunOptions",
    options: "BenchOptions",
) -> "Report":
    """The bench on a GPU."""
    from models.cli_output import progress_bar

    from .bench.gpu import GpuBench, GpuPlace, cuda_device, gpu_subject

    device = cuda_device(name)
    subject = gpu_subject(artifact, random, rank, run, device)
    with progress_bar("measuring") as progress:
        return GpuBench(GpuPlace.of(device, rank), subject, options).run(progress)


def _print(report: "Report", *, as_json: bool) -> None:
    from models.cli_output import print_json

    from .bench.output import print_report

    if not as_json:
        print_report(report)
    print_json(report.to_dict())


def _check_subjects(
    artifact: Path | None, random: str | None, against: str | None, gguf: Path | None, device: str
) -> None:
    """Raise QerveError unless it is clear what is to be measured, and beside what."""
    is_gpu = device != "cpu"
    if (artifact is not None and random is not None) or (artifact is None and random is None and not is_gpu):
        raise QerveError("what is to be measured? Give the directory of an artifact, or --random SHAPE")
    if is_gpu and against is not None:
        raise QerveError(f"--against {against} is measured on the CPU only; leave it out, or choose --device cpu")
    if (against is None) != (gguf is None):
        raise QerveError("--against llama.cpp and --gguf FILE belong together")
    if gguf is not None and not gguf.is_file():
        raise QerveError(f"{gguf}: there is no such file")
