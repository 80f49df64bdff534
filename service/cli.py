"""The front door: ``qerve serve`` and ``qerve bench``, and the offline verbs of ``models.cli``."""

from models.cli import make_cli, run_cli

from .cli_bench import EXAMPLE as BENCH_EXAMPLE
from .cli_bench import bench
from .cli_serve import EXAMPLE as SERVE_EXAMPLE
from .cli_serve import serve


def main() -> None:
    """Run the ``qerve`` command."""
    cli = make_cli()
    cli.command("bench", epilog=f"Example: {BENCH_EXAMPLE}")(bench)
    cli.command("serve", epilog=f"Example: {SERVE_EXAMPLE}")(serve)
    run_cli(cli)
