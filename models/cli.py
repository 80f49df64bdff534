"""The offline verbs: parse, call one function, print."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .cli_compare import EXAMPLE as COMPARE_EXAMPLE
from .cli_compare import compare
from .cli_eval import evaluate, lm_evaluation_harness
from .cli_export import make_export_cli
from .cli_options import with_build_options
from .cli_output import RichObserver, print_build_report, print_inspection
from .cli_plan import plan
from .config import BuildConfig
from .errors import QerveError
from .sizes import size_option

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
        rich_markup_mode="markdown",  # rich markup would take "[default: 4]" for a style and drop it
    )
    cli.callback()(lambda: None)
    verbs: tuple[tuple[str, Callable[..., None], str], ...] = (
        (
            "build",
            build,
            "qerve build ./SmolLM2-135M --out artifacts/smollm2-w4 --num-bits 4 --group-size 64 --rank 32",
        ),
        ("plan", plan, "qerve plan ./SmolLM2-135M --target-bits 4.5 --quantizer gptq --factor-dtype int8"),
        ("eval", evaluate, "qerve eval artifacts/smollm2-w4 --text wiki.test.raw --window 1024 --max-windows 32"),
        ("compare", compare, COMPARE_EXAMPLE),
        ("inspect", inspect, "qerve inspect artifacts/smollm2-w4 --layers"),
    )
    for name, verb, example in verbs:
        cli.command(name, epilog=f"Example: {example}")(verb)
    cli.add_typer(make_export_cli(), name="export")
    # The harness parses its own options, --help included.
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    cli.command("lm-eval", context_settings=passed_on)(lm_evaluation_harness)
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


@with_build_options
def build(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a Hugging Face directory, a .gguf file, a Hub id.")],
    *,
    out: Annotated[Path, typer.Option(help="Artifact directory to write.")],
    settings: BuildConfig,
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing artifact.")] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory to hold, e.g. 8GiB; the calibration set goes to disk if it must.")
    ] = None,
    json_report: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into an artifact."""
    from .build import build_artifact
    from .build.recipe import training_method
    from .llama.checkpoint import open_checkpoint
    from .memory import keep_large_blocks, map_large_blocks

    (map_large_blocks if training_method(settings) is None else keep_large_blocks)()
    with RichObserver() as observer:
        report = build_artifact(
            open_checkpoint(checkpoint, revision),
            out,
            settings,
            device=device,
            overwrite=overwrite,
            observer=observer,
            max_memory=size_option("--max-memory", max_memory),
        )
    if json_report is not None:
        json_report.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    print_build_report(report, as_json=as_json)


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.")],
    *,
    layers: Annotated[bool, typer.Option(help="Also one row per linear layer.")] = False,
    device: Device = "cpu",
    verify: Annotated[bool, typer.Option(help="Check every byte against its hash.")] = True,
    backend: Annotated[str, typer.Option(help="Kernel backend: auto, native, reference, ...")] = "auto",
    activations: Annotated[
        Literal["auto", "8", "16"], typer.Option(help="Native kernels round inputs to as many bits; auto: 8.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Show what is in an artifact, and which kernel backend would run each layer here."""
    from .artifact.execution import RunOptions
    from .artifact.inspect import inspect_artifact
    from .build.host_memory import predict_host_memory

    options = RunOptions(backend, activations)
    inspection = inspect_artifact(artifact, device, verify, options)
    memory = predict_host_memory(artifact) if device == "cpu" and backend == "auto" else None
    print_inspection(inspection, memory, layers=layers, as_json=as_json)
