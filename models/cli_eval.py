"""``qerve eval``: what to measure, the measuring, and what is printed; and the way into lm-evaluation-harness."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from .cli_output import WIDE, progress_bar
from .errors import EvaluationError
from .plain import finite

if TYPE_CHECKING:
    from .evaluate.corpora import Corpus
    from .evaluate.load import Evaluated
    from .evaluate.tasks import Task, TaskResult
    from .evaluate.texts import TextResult, TextSettings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Texts = Annotated[list[Path] | None, typer.Option(help="UTF-8 text file to score; repeatable.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Task: a .jsonl file, or one of piqa, arc_easy, arc_challenge, hellaswag, winogrande, boolq, openbookqa, "
        "lambada_openai (downloaded); repeatable."
    ),
]
Conventions = Literal["plain", "wikitext2", "c4", "c4-samples", "ptb"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact directory, or a dense checkpoint to compare with.")],
    *,
    text: Texts = None,
    convention: Annotated[Conventions, typer.Option(help="How --text files become one stream of tokens.")] = "plain",
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Text dataset as the papers score it: wikitext2, c4, c4-samples, ptb (downloaded); repeatable."
        ),
    ] = None,
    task: Tasks = None,
    word_level: Annotated[bool, typer.Option("--word-level", help="Also perplexity per word and byte.")] = False,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows, and word-level documents.")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. [default: 1024, or the model's context if shorter]")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. [default: the window]")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Score only the first windows.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Context of tasks and word level. [default: the model's]")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass of tasks.")] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")] = "cpu",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Activation type.")] = "auto",
    backend: Annotated[str, typer.Option(help="Kernel backend: auto, reference, ...")] = "auto",
    activations: Annotated[
        Literal["auto", "8", "16"], typer.Option(help="Native kernels round inputs to as many bits; auto: 8.")
    ] = "auto",
    kv_cache_dtype: Annotated[Literal["auto", "fp16", "int8"], typer.Option(help="Keys and values.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on texts, and accuracy on tasks."""
    from .artifact.execution import RunOptions
    from .evaluate.load import load_for_evaluation, parse_device
    from .evaluate.texts import TextSettings

    settings = TextSettings(window, stride, max_windows, word_level, max_rows, max_length, max_batch_tokens)
    settings.check()
    parse_device(device)
    _check_request(text, dataset, task, word_level, out)
    corpora, tasks = _read(text or (), convention, dataset or (), task or (), max_rows)
    loaded = load_for_evaluation(model, device, dtype, RunOptions(backend, activations, kv_cache_dtype))
    texts = [_score_text(loaded, corpus, settings) for corpus in corpora]
    results = [_score_task(loaded, item, max_batch_tokens, max_length) for item in tasks]
    values = _to_dict(model, str(loaded.model.dtype).removeprefix("torch."), texts, results)
    if out is not None:
        out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(values))
    else:
        _print_tables(model, values["dtype"], texts, results)


def lm_evaluation_harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which then knows the model `qerve`; every option is the harness's own.

    Raises:
        EvaluationError: the harness is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise EvaluationError("lm-evaluation-harness is not installed: pip install 'qerve[eval]'")
    from lm_eval.__main__ import cli_evaluate

    from .evaluate import lm_eval_model  # noqa: F401 registers the model

    sys.argv = ["qerve lm-eval", *context.args]
    cli_evaluate()


def _check_request(
    text: Sequence[Path] | None,
    dataset: Sequence[str] | None,
    task: Sequence[str] | None,
    word_level: bool,
    out: Path | None,
) -> None:
    if not (text or dataset or task):
        raise EvaluationError("nothing to measure: give --text FILE, --dataset wikitext2 or --task FILE")
    if word_level and not (text or dataset):
        raise EvaluationError("--word-level needs a text: give --text FILE or --dataset wikitext2")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise EvaluationError(f"--out {out}: not a file in an existing directory")


def _read(
    text: Sequence[Path],
    convention: Conventions,
    dataset: Sequence[str],
    task: Sequence[str],
    max_rows: int | None,
) -> tuple[list["Corpus"], list["Task"]]:
    """Local files first: a mistake there should not wait for a download."""
    from .evaluate.corpora import load_corpus, read_corpus
    from .evaluate.hub_tasks import load_task

    corpora = [read_corpus(path, convention) for path in text]
    tasks = {name: load_task(name, max_rows) for name in sorted(task, key=lambda name: not Path(name).exists())}
    corpora += [load_corpus(name) for name in dataset]
    return corpora, [tasks[name] for name in task]


def _score_text(loaded: "Evaluated", corpus: "Corpus", settings: "TextSettings") -> "TextResult":
    from .evaluate.texts import score_text

    with progress_bar(f"{Path(corpus.name).name}: windows") as on_progress:
        return score_text(loaded.model, loaded.tokenizer, corpus, settings, on_progress)


def _score_task(loaded: "Evaluated", task: "Task", max_batch_tokens: int, max_length: int | None) -> "TaskResult":
    from .evaluate.tasks import score_task

    with progress_bar(f"{task.name}: choices") as on_progress:
        return score_task(
            loaded.model,
            loaded.tokenizer,
            task,
            max_batch_tokens=max_batch_tokens,
            max_length=max_length,
            on_progress=on_progress,
        )


def _to_dict(
    model: str, dtype: str, texts: Sequence["TextResult"], results: Sequence["TaskResult"]
) -> dict[str, Any]:  # fmt: skip
    """A single text's numbers are at the top level too, where scripts that measure nothing else look for them."""
    values: dict[str, Any] = {"model": model, "dtype": dtype}
    if len(texts) == 1:
        values |= texts[0].to_dict()
    values |= {"texts": [item.to_dict() for item in texts], "tasks": [item.to_dict() for item in results]}
    without_nan: dict[str, Any] = finite(values)
    return without_nan


def _print_tables(model: str, dtype: str, texts: Sequence["TextResult"], results: Sequence["TaskResult"]) -> None:
    console = Console()
    width = None if console.is_terminal else WIDE
    for item in texts:
        table = Table(title=f"{model} on {item.text}", show_header=False, title_justify="left")
        for row in _text_rows(item, dtype):
            table.add_row(*row)
        console.print(table, width=width)
    if results:
        table = Table("task", "rows", "acc", "acc_norm", "perplexity", title=f"{model} ({dtype})", title_justify="left")
        for result in results:
            table.add_row(*_task_row(result))
        console.print(table, width=width)
    for result in results:
        if result.num_truncated:
            console.print(
                f"{result.task}: {result.num_truncated} rows lost the beginning of a context that was too long"
            )


def _text_rows(item: "TextResult", dtype: str) -> list[tuple[str, str]]:
    scored, words = item.by_token, item.by_word
    overlap = "" if item.stride == item.window else f", stride {item.stride}"
    rows = [
        ("token perplexity", f"{scored.perplexity:.4f}"),
        ("nll", f"{scored.nll:.6f} nats/token"),
        ("scored", f"{scored.num_tokens} tokens in {scored.num_windows} windows of {item.window}{overlap}"),
    ]
    if words is not None:
        rows += [
            ("word perplexity", f"{words.word_perplexity:.4f}"),
            ("byte perplexity", f"{words.byte_perplexity:.4f} ({words.bits_per_byte:.4f} bits per byte)"),
            (
                "scored, word level",
                f"{words.num_words} words, {words.num_bytes} bytes in {words.num_documents} documents",
            ),
        ]
    return [*rows, ("convention", item.convention), ("activations", dtype)]


def _task_row(result: "TaskResult") -> tuple[str, ...]:
    has_norm = result.acc_norm is not None and result.acc_norm_stderr is not None
    norm = f"{result.acc_norm:.4f} ± {result.acc_norm_stderr:.4f}" if has_norm else "-"
    perplexity = "-" if result.perplexity is None else f"{result.perplexity:.4f}"
    return result.task, str(result.num_rows), f"{result.acc:.4f} ± {result.acc_stderr:.4f}", norm, perplexity
