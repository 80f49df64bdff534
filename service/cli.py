"""The front door: ``qerve serve`` and ``qerve bench``, and the offline verbs of ``models.cli``."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from models.cli import make_cli, run_cli
from models.errors import QerveError

from .cli_bench import EXAMPLE as BENCH_EXAMPLE
from .cli_bench import bench


def main() -> None:
    """Run the ``qerve`` command."""
    cli = make_cli()
    cli.command("bench", epilog=f"Example: {BENCH_EXAMPLE}")(bench)
    cli.command("serve", epilog="Example: qerve serve artifacts/smollm2-w4 --port 8000")(serve)
    run_cli(cli)


def serve(  # noqa: PLR0917 typer makes an option of each
    artifact: Annotated[Path | None, typer.Argument(help="Artifact directory, as `qerve build` wrote it.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any free one. [default: 8000]")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for. [default: the directory's name]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N. [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Activations: auto, float32, bfloat16, float16. [default: auto]")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Kernel backend: auto, reference, ... [default: auto]")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Native kernels round inputs to bits: auto, 8, 16. [default: auto, which is 8]")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Keys and values: auto, fp16, int8. [default: auto]")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output together. [default: the model's context]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences generated at once. [default: 8]")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step; longer prompts run in chunks. [default: 512, on a GPU 2048]")
    ] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Key-value cache, e.g. 2GiB. [default: from free memory]")
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse keys and values of prompts that begin alike. [default: on]",
        ),
    ] = None,
    speculative_tokens: Annotated[
        int | None,
        typer.Option(help="Guessed tokens that a step checks beside each sequence's next. [default: 0, none]"),
    ] = None,
    ngram_max: Annotated[
        int | None, typer.Option(help="Last tokens that are looked up together for a guess, at most. [default: 3]")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that may wait. [default: 64]")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; better given as QERVE_API_KEY.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error. [default: info]")] = None,
) -> None:
    """Serve an artifact over an OpenAI-compatible HTTP API; every option can also be set as QERVE_NAME."""
    options = {name: value for name, value in locals().items() if value is not None}
    _serve(options)


def _serve(options: dict[str, Any]) -> None:
    # Imports go from light to heavy, so that a mistake is answered at once and --help needs none of them.
    from .listener import bind, url_of
    from .settings import read_settings

    settings = read_settings(options)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.artifact is None:
        raise QerveError("which artifact? Give its directory: qerve serve artifacts/NAME (or set QERVE_ARTIFACT)")
    if not settings.artifact.is_dir():
        raise QerveError(f"{settings.artifact}: there is no such directory; make an artifact with `qerve build`")
    with bind(settings.host, settings.port) as listener:
        from models.artifact.execution import RunOptions
        from models.artifact.load import load_artifact
        from models.memory import return_freed_memory

        from .app import create_app
        from .server import DrainingServer

        choices = RunOptions(settings.backend, settings.activations, settings.kv_cache_dtype)
        loaded = load_artifact(settings.artifact, settings.torch_device, settings.torch_dtype, options=choices)
        app = create_app(loaded, settings)
        return_freed_memory()
        message = f"Serving {app.state.context.info.name} on {url_of(listener)} (Ctrl-C stops it)"
        DrainingServer(app, settings.log_level, lambda: typer.echo(message)).run(sockets=[listener])
