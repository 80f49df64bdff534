"""The offline verbs: parse, call one function, print."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .cli_options import build_config, read_text
from .cli_output import RichObserver, print_build_report, print_inspection, print_perplexity, progress_bar
from .errors import QerveError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")]


def make_cli() -> typer.Typer:
    """The command line with every offline verb; ``service.cli`` adds ``serve`` to it."""
    cli = typer.Typer(
        name="qerve",
        help="Quantize LLaMA-family checkpoints with low-rank error reconstruction, and serve the result.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    cli.callback()(lambda: None)
    for verb, example in (
        (build, "qerve build ./SmolLM2-135M --out artifacts/smollm2-w4 --num-bits 4 --group-size 64 --rank 32"),
        (evaluate, "qerve eval artifacts/smollm2-w4 --text wiki.test.raw --window 1024 --max-windows 32"),
        (inspect, "qerve inspect artifacts/smollm2-w4 --layers"),
    ):
        name = "eval" if verb is evaluate else verb.__name__
        cli.command(name, epilog=f"Example: {example}")(verb)
    return cli


def run_cli(cli: Callable[[], Any]) -> None:
    """Run ``cli``; a QerveError becomes one line on stderr and exit status 1."""
    # OpenMP reads it once, when torch is first imported, which no verb has done yet. Threads that spin while they wait
    # slow everything down several times over as soon as anything else wants their core (docs/decisions/0005).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        cli()
    except QerveError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from error


def build(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a Hugging Face directory, a .gguf file, a Hub id.")],
    *,
    out: Annotated[Path, typer.Option(help="Artifact directory to write.")],
    config: Annotated[Path | None, typer.Option(help="Configuration (.toml, .json); options override it.")] = None,
    method: Annotated[str | None, typer.Option(help="Reconstruction method. [default: qera-exact]")] = None,
    num_bits: Annotated[int | None, typer.Option(help="Bits per code, 2 to 8. [default: 4]")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128, or -1 per channel. [default: 64]")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="[default: asymmetric]", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the correction. [default: 32]")] = None,
    factor_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32. [default: bfloat16]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="self, none, a .txt/.jsonl/.json/.safetensors file, hf:DATASET. [default: self]"),
    ] = None,
    num_sequences: Annotated[int | None, typer.Option(help="Calibration sequences. [default: 128]")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence. [default: 2048]")] = None,
    num_holdout: Annotated[int | None, typer.Option(help="Sequences kept for perplexity. [default: 4]")] = None,
    calibration_inputs: Annotated[
        str | None, typer.Option(help="quantized or dense prefix. [default: quantized]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the self-written text. [default: 0]")] = None,
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing artifact.")] = False,
    json_report: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into an artifact."""
    from .build import build_artifact
    from .llama.checkpoint import open_checkpoint
    from .memory import map_large_blocks

    settings = build_config(
        config,
        scheme={"num_bits": num_bits, "group_size": group_size, "is_symmetric": symmetric},
        reconstruct={"method": method, "rank": rank, "factor_dtype": factor_dtype},
        calibration={
            "source": calibration,
            "num_sequences": num_sequences,
            "sequence_length": sequence_length,
            "num_holdout": num_holdout,
            "inputs": calibration_inputs,
            "seed": seed,
        },
    )
    map_large_blocks()
    with RichObserver() as observer:
        report = build_artifact(
            open_checkpoint(checkpoint, revision), out, settings, device=device, overwrite=overwrite, observer=observer
        )
    if json_report is not None:
        json_report.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    print_build_report(report, as_json=as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact directory, or a dense checkpoint to compare with.")],
    *,
    text: Annotated[Path, typer.Option(help="UTF-8 text file to score.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. [default: the window]")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Score only the first windows.")] = None,
    device: Device = "cpu",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Activation type.")] = "auto",
    backend: Annotated[str, typer.Option(help="Kernel backend: auto, reference, ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure token perplexity on a text file."""
    from .evaluate.load import load_for_evaluation
    from .evaluate.perplexity import perplexity

    loaded = load_for_evaluation(model, device, dtype, backend)
    token_ids = loaded.tokenizer.encode(read_text(text))
    with progress_bar("scoring windows") as on_window:
        result = perplexity(
            loaded.model, token_ids, window=window, stride=stride, max_windows=max_windows, on_window=on_window
        )
    print_perplexity(model, str(loaded.model.dtype).removeprefix("torch."), result, as_json=as_json)


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    layers: Annotated[bool, typer.Option(help="Also one row per linear layer.")] = False,
    device: Device = "cpu",
    verify: Annotated[bool, typer.Option(help="Check every byte against its hash.")] = True,
    as_json: Json = False,
) -> None:
    """Show what is in an artifact, and which kernel backend would run each layer here."""
    from .artifact.inspect import inspect_artifact

    print_inspection(inspect_artifact(artifact, device=device, is_verified=verify), layers=layers, as_json=as_json)
