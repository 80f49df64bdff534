"""From nothing to tokens: fetch a small real model, quantize it, serve it, try it, print what came out.

Everything goes through the same commands a user would type (``qerve build``, ``qerve serve``) and the HTTP API.
"""

import argparse
import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from .demo_client import ChatResult, Client, DemoError
from .demo_server import HOST, Server, free_port
from .fetch_model import FILE_NAME, ROOT, FetchError, fetch_model

CACHE = ROOT / ".cache"
BUILD_REPORT = CACHE / "demo-build.json"
SERVER_LOG = CACHE / "demo-server.log"
MANIFEST = "quantization.json"
MANIFEST_KEYS = ("evaluation", "dense_bytes", "effective_bits")
BUILD_OPTIONS = ("--method", "qera-exact", "--num-bits", "4", "--group-size", "64", "--rank", "32")
QUESTION = "In two sentences: why is the sky blue?"
MAX_TOKENS = 96
MIB = 1 << 20
# Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter I.
PERPLEXITY_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations "
    "in it, \u201cand what is the use of a book,\u201d thought Alice \u201cwithout pictures or conversations?\u201d"
)

Rows = list[tuple[str, str]]


def parse_arguments() -> argparse.Namespace:
    """Options of the demo."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the summary instead of serving on")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on, or the next free one above it")
    parser.add_argument("--num-sequences", type=int, default=14, help="calibration sequences of the build")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per calibration sequence")
    return parser.parse_args()


def qerve(*arguments: str) -> list[str]:
    """Command line of the ``qerve`` that belongs to the running interpreter."""
    return [str(Path(sysconfig.get_path("scripts")) / "qerve"), *arguments]


def artifact_path(checkpoint: Path) -> Path:
    """Where the artifact of ``checkpoint`` goes: another checkpoint gets another artifact."""
    name = "smollm2-135m" if checkpoint.name == FILE_NAME else checkpoint.stem.lower()
    return ROOT / "artifacts" / f"{name}-w4-qera"


def build(checkpoint: Path, artifact: Path, options: argparse.Namespace) -> Rows:
    """Run ``qerve build``, which shows its progress on the terminal; rows for what it measured."""
    BUILD_REPORT.parent.mkdir(parents=True, exist_ok=True)
    command = qerve("build", str(checkpoint), "--out", str(artifact), *BUILD_OPTIONS)
    command += ["--num-sequences", str(options.num_sequences), "--sequence-length", str(options.sequence_length)]
    command += ["--json-report", str(BUILD_REPORT)]
    if code := subprocess.run(command, check=False).returncode:
        raise DemoError(f"the build failed with exit status {code}: {' '.join(command)}")
    report = json.loads(BUILD_REPORT.read_text(encoding="utf-8"))
    peak, bound = report["peak_memory_bytes"] / MIB, report["memory_bound_bytes"] / MIB
    writing = report["preparation_peak_bytes"] / MIB
    return [
        ("build time", f"{report['seconds']:.0f} s"),
        ("build memory", f"{peak:.0f} MiB above start (embedding, one layer and activations: {bound:.0f} MiB)"),
        ("calibration memory", f"{writing:.0f} MiB above start, while the model writes its calibration text"),
    ]


def artifact_rows(artifact: Path) -> Rows:
    """Rows for what the artifact says about itself."""
    path = artifact / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        evaluation, dense_bytes, effective_bits = (manifest[key] for key in MANIFEST_KEYS)
    except (OSError, ValueError, KeyError) as error:
        raise DemoError(f"{path} cannot be read ({error!r}); delete {artifact} and run the demo again") from error
    size_bytes = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    size = f"{size_bytes / MIB:.1f} MiB; dense {dense_bytes / MIB:.1f} MiB ({size_bytes / dense_bytes:.1%})"
    return [
        ("dense perplexity", measured(evaluation, "dense_perplexity")),
        ("quantized perplexity", measured(evaluation, "quantized_perplexity")),
        ("effective bits", f"{effective_bits:.3f} per weight"),
        ("artifact size", size),
    ]


def measured(evaluation: dict[str, float], name: str) -> str:
    """What the build measured under ``name``, if it kept sequences apart to measure on."""
    return f"{evaluation[name]:.3f} (calibration holdout)" if name in evaluation else "not measured"


def try_server(client: Client, model: str) -> tuple[Rows, ChatResult]:
    """Send one chat and one perplexity request; rows for what the server showed."""
    chat = client.chat(model, QUESTION, MAX_TOKENS)
    score = client.perplexity(model, PERPLEXITY_TEXT)
    pace = "-" if chat.tokens_per_second is None else f"{chat.tokens_per_second:.1f}"
    rows = [
        ("resident memory", f"{client.metric('process_resident_memory_bytes') / MIB:.0f} MiB"),
        ("time to first token", f"{chat.ttft_seconds * 1000:.0f} ms"),
        ("tokens/s", f"{pace} over {chat.num_tokens} tokens"),
        ("perplexity request", f"{score['perplexity']:.3f} over {score['num_tokens']} tokens of Alice in Wonderland"),
    ]
    return rows, chat


def print_summary(console: Console, rows: Rows, answer: str, url: str, model: str) -> None:
    """Table of results, the model's answer, and a command to go on with."""
    table = Table(title=f"qerve: {model}", show_header=False)
    for name, value in (*rows, ("question", QUESTION), ("answer", answer.strip()), ("URL", url)):
        table.add_row(name, value)
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Tell me a short story."}]}
    console.print(table, markup=False)
    console.print("Try it:", markup=False)
    console.print(
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def serve(console: Console, artifact: Path, rows: Rows, options: argparse.Namespace) -> None:
    """Serve ``artifact``, show it at work, and go on serving unless asked not to."""
    port = free_port(options.port)
    if port != options.port:
        console.print(f"port {options.port} is taken: using {port}")
    command = qerve("serve", str(artifact), "--host", HOST, "--port", str(port))
    with Server(command, port, SERVER_LOG) as server:
        with console.status("starting the server"):
            ready_seconds = server.wait_until_ready()
        model = server.client.model_name()
        with console.status("one chat request, one perplexity request"):
            server_rows, chat = try_server(server.client, model)
        rows = [*rows, ("ready after", f"{ready_seconds:.2f} s"), *server_rows]
        print_summary(console, rows, chat.text, server.client.url, model)
        if not options.once:
            console.print(f"Serving on {server.client.url} until Ctrl-C; log: {SERVER_LOG.relative_to(ROOT)}")
            serve_until_interrupted(console, server)


def serve_until_interrupted(console: Console, server: Server) -> None:
    """Ctrl-C is the expected end here, not a failure."""
    try:
        server.wait()
    except KeyboardInterrupt:
        console.print("stopping")


def run(console: Console, options: argparse.Namespace) -> None:
    """The whole demo, one line per step."""
    checkpoint = fetch_model()
    artifact = artifact_path(checkpoint)
    if (artifact / MANIFEST).is_file():
        console.print(f"reusing {artifact.relative_to(ROOT)}")
        rows: Rows = []
    else:
        rows = build(checkpoint, artifact, options)
    serve(console, artifact, rows + artifact_rows(artifact), options)


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Treat a polite request to end like Ctrl-C, so that the server is stopped on every way out."""
    raise KeyboardInterrupt


def main() -> int:
    """Exit status: 0 when every step worked, 1 when one failed, 130 when interrupted before the summary."""
    options = parse_arguments()
    console = Console()
    # SIGINT too: a shell that starts a job in the background has it ignored.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    try:
        run(console, options)
    except (DemoError, FetchError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
