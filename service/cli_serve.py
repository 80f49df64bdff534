"""``qerve serve``: an option for every setting, made from the settings themselves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from models.errors import QerveError

from .settings import Settings

EXAMPLE = "qerve serve artifacts/smollm2-w4 --port 8000"


def with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Give ``verb`` an option for every field of ``Settings`` (``artifact`` is the argument); it gets those given."""
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
        for name in Settings.model_fields
    ]

    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in Settings.model_fields}
        verb({name: value for name, value in chosen.items() if value is not None}, **values)

    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__signature__ = inspect.Signature([*added, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*added, *own)}
    return run


def _annotation(name: str) -> Any:
    """Every value is taken as text: the settings parse and check it, and an error names it."""
    field = Settings.model_fields[name]
    default = "" if field.default in (None, ()) else f" [default: {field.default}]"
    help_text = f"{field.description}.{default}"
    if name == "artifact":
        return Annotated[str | None, typer.Argument(help=help_text)]
    if field.annotation is bool:
        flag = name.replace("_", "-")
        return Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=help_text)]
    return Annotated[str | None, typer.Option(help=help_text, metavar="TEXT")]


@with_settings
def serve(
    options: dict[str, Any],
    *,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective settings and where they come from; then exit.")
    ] = False,
) -> None:
    """Serve an artifact over an OpenAI-compatible HTTP API.

    Every option can also be set as QERVE_NAME or in the --config file; options go over variables over the file.
    """
    # Imports go from light to heavy, so that a mistake is answered at once and --help needs none of them.
    from .configuration import describe, read_settings

    settings = read_settings(options)
    if print_config:
        typer.echo(describe(settings, options), nl=False)
        return
    _check_artifact(settings.artifact)
    settings.check_driver()
    from .process import serve_settings

    serve_settings(settings)


def _check_artifact(artifact: Path | None) -> None:
    if artifact is None:
        raise QerveError("which artifact? Give its directory: qerve serve artifacts/NAME (or set QERVE_ARTIFACT)")
    if not artifact.is_dir():
        raise QerveError(f"{artifact}: there is no such directory; make an artifact with `qerve build`")
