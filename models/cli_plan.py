"""``qerve plan``: what a build would come to, before it is started."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from .cli_card import Card, is_artifact, print_serving, serving_rows
from .cli_options import with_build_options
from .cli_output import GIB, MIB, WIDE, RichObserver, print_json
from .config import BuildConfig

if TYPE_CHECKING:
    from .build.planned import Plan, PlannedLayer
    from .llama.device_memory import ServingPlan


@with_build_options
def plan(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint: a Hugging Face directory, a .gguf file, a Hub id; or an artifact.")
    ],
    *,
    settings: BuildConfig,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Predict the network's loss, or output errors only.")
    ] = True,
    write: Annotated[
        Path | None, typer.Option(help="Write the configuration with every layer's bits and rank (.toml, .json).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")] = "cpu",
    device_memory: Annotated[
        str | None, typer.Option(help="Also plan serving on a GPU with this much memory, e.g. 24GiB.")
    ] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of it that the server may take.")] = 0.9,
    max_num_seqs: Annotated[int, typer.Option(min=1, max=1024, help="Sequences generated at once there.")] = 8,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step there.")] = 2048,
    kv_cache_dtype: Annotated[Literal["auto", "fp16", "int8"], typer.Option(help="Keys and values there.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Predict size, memory and loss of a build, and how --target-bits would be spent.

    Of an artifact that is there already: what serving it on a GPU takes (--device-memory).
    """
    from .build.planning import plan_build
    from .llama.checkpoint import open_checkpoint

    card = Card(device_memory, gpu_memory_utilization, max_num_seqs, max_num_batched_tokens, kv_cache_dtype)
    if is_artifact(checkpoint):
        print_serving(checkpoint, card.of_artifact(Path(checkpoint)), as_json=as_json)
        return
    with RichObserver() as observer:
        opened = open_checkpoint(checkpoint, revision)
        card.check()
        result = plan_build(opened, settings, device=device, observer=observer, use_gradients=gradients)
    serving = card.of_plan(opened.config, result)
    if write is not None:
        spent_config(settings, result).write(write)
    print_plan(checkpoint, settings, result, serving, as_json=as_json)


def spent_config(settings: BuildConfig, result: "Plan") -> BuildConfig:
    """``settings`` with the budget spent: what ``qerve build --config`` builds without planning again."""
    values: dict[str, Any] = settings.to_dict() | {"budget": None}
    layers = {
        path: {"num_bits": it.num_bits, "group_size": it.group_size, "rank": it.rank}
        for path, it in result.layers.items()
    }
    return BuildConfig.from_dict(values | {"layers": layers}, "plan")


def print_plan(
    checkpoint: str, settings: BuildConfig, result: "Plan", serving: "ServingPlan | None" = None, *, as_json: bool
) -> None:
    """The plan as a summary and a table of choices by kind of layer, or as one JSON object."""
    if as_json:
        on_card = {} if serving is None else {"serving": serving.to_dict()}
        print_json({"checkpoint": checkpoint, **result.to_dict(), **on_card})
        return
    summary = Table(title=checkpoint, show_header=False, title_justify="left")
    for name, value in (_summary(settings, result) | serving_rows(serving)).items():
        summary.add_row(name, value)
    choices = Table("layers", "bits: number of layers", "rank: number of layers", "effective bits")
    if _has_losses(result):
        choices.add_column("loss")
    for row in _choices(result):
        choices.add_row(*row)
    console = Console()
    for table in (summary, choices):
        console.print(table, width=None if console.is_terminal else WIDE, crop=False)


def _summary(settings: BuildConfig, result: "Plan") -> dict[str, str]:
    rows = {"effective bits per weight": f"{result.effective_bits:.4f}"}
    if settings.budget is not None:
        rows["effective bits per weight"] += f" (target {settings.budget.target_bits:g})"
    if result.nll_increase is not None:
        rows["predicted nll increase"] = f"{result.nll_increase:.4f} nats per token, to second order"
        rows["predicted perplexity"] = f"{result.perplexity_ratio:.4g} times that of the dense network"
    if result.output_error is not None:
        rows["predicted output error"] = f"{result.output_error:.3e}, squared and relative, mean over layers"
    if not _has_losses(result):
        rows["predicted loss"] = "none without calibration"
    rows["artifact"] = f"{_mib(result.artifact_bytes)} (dense 16-bit: {_mib(result.dense_bytes)})"
    rows |= {f"  {name}": _mib(size) for name, size in sorted(result.component_bytes.items()) if size}
    rows["weights when served"] = _mib(result.resident_bytes)
    rows["key-value cache"] = f"{_mib(result.kv_cache_bytes)} per 1024 tokens"
    rows["memory to build"] = f"at most about {_mib(result.build_memory_bytes)}"
    if result.training_memory_bytes is not None:
        rows["memory to train"] = f"at most about {_mib(result.training_memory_bytes)} on the device"
    phases = sorted(result.gpu_memory_bytes.items(), key=lambda phase: -phase[1])
    if phases:
        rows["memory of a GPU to build on"] = f"at most about {_gib(phases[0][1])}, and what its libraries take"
        rows |= {f"  {name}": _gib(size) for name, size in phases}
    rows["planned in"] = f"{result.seconds:.1f} s"
    return rows


def _choices(result: "Plan") -> Iterable[tuple[str, ...]]:
    """One row per kind of projection, in network order, and one for all."""
    kinds: defaultdict[str, list[PlannedLayer]] = defaultdict(list)
    for path, layer in result.linears.items():
        kinds[path.rpartition(".")[2]].append(layer)
    total = sum(layer.loss or 0.0 for layer in result.linears.values())
    for kind, layers in (*kinds.items(), ("all", list(result.linears.values()))):
        num_weights = sum(layer.num_weights for layer in layers)
        bits = sum(layer.effective_bits * layer.num_weights for layer in layers) / num_weights
        row = [kind, _histogram(it.num_bits for it in layers), _histogram(it.rank for it in layers), f"{bits:.3f}"]
        if _has_losses(result):
            share = sum(layer.loss or 0.0 for layer in layers) / total if total > 0 else 0.0
            row.append(f"{share:.1%}")
        yield tuple(row)


def _histogram(values: Iterable[int]) -> str:
    return "  ".join(f"{value}: {count}" for value, count in sorted(Counter(values).items()))


def _has_losses(result: "Plan") -> bool:
    return result.nll_increase is not None or result.output_error is not None


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.1f} MiB"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
