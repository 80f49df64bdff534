"""``qerve bench``: how fast an artifact runs here, as fractions of what the machine can do and beside llama.cpp."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from models.errors import QerveError

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
    from models.bench.machine import check_quiet, load_average
    from models.bench.workload import Workload
    from models.cli_output import print_json, progress_bar

    from .bench.options import BenchOptions, parse_sections
    from .bench.output import print_report
    from .bench.run import Bench
    from .bench.subject import artifact_subject, random_subject

    _check_subjects(artifact, random, against, gguf)
    llama = None if gguf is None else LlamaOptions(gguf, llama_python, not llama_no_repack)
    workload = Workload(prompt_tokens, decode_steps, prefill_tokens)
    options = BenchOptions(parse_sections(only), repeats, threads, workload, llama)
    check_quiet(load_average(), allow_noise=allow_noise)
    choices = RunOptions("auto", activations, kv_cache_dtype)
    if artifact is not None:
        subject = artifact_subject(artifact, choices, threads)
    else:
        with progress_bar("random weights") as progress:
            subject = random_subject(random or "", rank, choices, threads, progress)
    with progress_bar("measuring") as progress:
        report = Bench(subject, options).run(progress)
    if not as_json:
        print_report(report)
    print_json(report.to_dict())


def _check_subjects(artifact: Path | None, random: str | None, against: str | None, gguf: Path | None) -> None:
    """Raise QerveError unless it is clear what is to be measured, and beside what."""
    if (artifact is None) == (random is None):
        raise QerveError("what is to be measured? Give the directory of an artifact, or --random SHAPE")
    if (against is None) != (gguf is None):
        raise QerveError("--against llama.cpp and --gguf FILE belong together")
    if gguf is not None and not gguf.is_file():
        raise QerveError(f"{gguf}: there is no such file")
