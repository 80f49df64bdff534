"""Fine-tuning over a quantized base with PEFT: where it begins, and what 200 steps make of it.

    python -m tools.finetune_init CHECKPOINT --text wiki.valid.raw --held-out wiki.test.raw --out finetune

For each width and each initialisation an artifact is built, exported (``qerve export peft``) and trained: same codes'
grid, rank, text, order of batches and seed. ``zero`` is LoRA's own beginning (A random, B zero) over rounded weights;
``loftq``, ``qera-approx`` and ``qera-exact`` begin with a correction of the rounding error. Written are
``results.json``, ``table.md`` and ``curves.html`` (needs plotly). Needs the extra ``export``.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.artifact.load import load_artifact
from models.artifact.reader import ArtifactReader
from models.build import build_artifact
from models.config import BuildConfig
from models.export.dense import write_dense
from models.export.peft import export_peft
from models.export.source import ExportSource
from models.llama.checkpoint import open_checkpoint

INITIALISATIONS = ("zero", "loftq", "qera-approx", "qera-exact")
LOFTQ_ITERATIONS = 5
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs share.

    length:         tokens of a sequence
    batch:          sequences of a step
    evaluate_every: steps between two looks at the held-out text
    """

    rank: int
    group_size: int
    steps: int
    batch: int
    length: int
    learning_rate: float
    evaluate_every: int
    num_held_out: int
    num_calibration: int
    device: str


@dataclass(frozen=True, slots=True)
class Run:
    """One training: its loss at every step (nats per token), and the held-out nll by step."""

    num_bits: int
    initialisation: str
    losses: list[float]
    held_out: dict[int, float]


def artifact_of(out: Path, num_bits: int, initialisation: str, options: argparse.Namespace, settings: Settings) -> Path:
    """Build the artifact that an initialisation begins with."""
    method = "none" if initialisation == "zero" else initialisation
    own = {"iterations": LOFTQ_ITERATIONS} if method == "loftq" else {}
    calibration: dict[str, Any] = {
        "source": str(options.text),
        "num_sequences": settings.num_calibration,
        "sequence_length": settings.length,
        "num_holdout": 0,
        "inputs": "dense",
    }
    config = {
        "scheme": {"num_bits": num_bits, "group_size": settings.group_size},
        "reconstruct": {"method": method, "rank": 0 if method == "none" else settings.rank, "options": own},
        "calibration": calibration if method.startswith("qera") else {"source": "none"},
    }
    build_artifact(
        open_checkpoint(options.checkpoint), out, BuildConfig.from_dict(config, "finetune_init"), overwrite=True
    )
    return out


def trainable(artifact: Path, export: Path, settings: Settings) -> Any:
    """The artifact in PEFT: its base frozen, its correction (or a zero adapter) to be trained."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    with ArtifactReader.open(artifact) as reader:
        source = ExportSource(reader)
        has_correction = any(record.rank for record in source.manifest.linears.values())
        if not has_correction:
            export.mkdir(parents=True)
            write_dense(export, source, "float32", has_correction=False)
    if has_correction:
        export_peft(artifact, export, "dense", "float32")
        base = AutoModelForCausalLM.from_pretrained(export / "base")
        return PeftModel.from_pretrained(base, str(export / "adapter"), is_trainable=True)
    base = AutoModelForCausalLM.from_pretrained(export)
    return get_peft_model(base, LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=LAYERS))


def sequences(token_ids: list[int], length: int) -> Tensor:
    """(n, length) int64: the text in pieces, the last one dropped."""
    count = len(token_ids) // length
    return torch.tensor(token_ids[: count * length]).reshape(count, length)


def batches(pieces: Tensor, settings: Settings) -> Iterator[Tensor]:
    """``settings.steps`` batches in an order that is always the same."""
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    for step in range(settings.steps):
        rows = [int(order[(step * settings.batch + row) % len(order)]) for row in range(settings.batch)]
        yield pieces[rows]


def train(model: Any, text: Tensor, held_out: Tensor, settings: Settings) -> tuple[list[float], dict[int, float]]:
    """Losses by step and held-out nll by step; AdamW, constant rate after ten steps of warm-up."""
    model.to(settings.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    seen = {0: evaluate(model, held_out, settings)}
    for step, batch in enumerate(batches(text, settings), start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / 10)
        model.train()
        ids = batch.to(settings.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % settings.evaluate_every == 0 or step == settings.steps:
            seen[step] = evaluate(model, held_out, settings)
    return losses, seen


@torch.inference_mode()
def evaluate(model: Any, held_out: Tensor, settings: Settings) -> float:
    """nll of the held-out text, nats per token."""
    model.eval()
    losses = [
        float(model(input_ids=row[None].to(settings.device), labels=row[None].to(settings.device)).loss)
        for row in held_out
    ]
    return sum(losses) / len(losses)


def table(runs: list[Run]) -> str:
    """Perplexities before and after, as Markdown."""
    lines = [
        "| bits | begins with | held-out perplexity before | after | mean loss of the last tenth |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        first, last = run.held_out[0], run.held_out[max(run.held_out)]
        tail = run.losses[-max(1, len(run.losses) // 10) :]
        lines.append(
            f"| {run.num_bits} | `{run.initialisation}` | {math.exp(first):.2f} | {math.exp(last):.2f} | "
            f"{sum(tail) / len(tail):.4f} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: list[Run], path: Path) -> None:
    """Losses by step, smoothed over ten, one line per run."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for run in runs:
        smooth = [sum(run.losses[max(0, at - 9) : at + 1]) / min(at + 1, 10) for at in range(len(run.losses))]
        figure.add_scatter(y=smooth, name=f"{run.num_bits} bits, {run.initialisation}", mode="lines")
    figure.update_layout(xaxis_title="step", yaxis_title="training loss, nats per token, mean of ten steps")
    figure.write_html(path, include_plotlyjs=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="to train on, and to calibrate with")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--initialisations", nargs="+", default=list(INITIALISATIONS), choices=INITIALISATIONS)
    for name, default in (
        ("rank", 16), ("group_size", 64), ("steps", 200), ("batch", 4), ("length", 256), ("evaluate_every", 25),
        ("num_held_out", 16), ("num_calibration", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Build, export, train and write; results are written after every run."""
    options = parse()
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: getattr(options, name) for name in names})
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for num_bits in options.bits:
        for initialisation in options.initialisations:
            name = f"{initialisation}-{num_bits}"
            artifact = artifact_of(options.out / f"artifact-{name}", num_bits, initialisation, options, settings)
            tokenizer = load_artifact(artifact, verify="structure").tokenizer
            text, held_out = (
                sequences(tokenizer.encode(path.read_text(encoding="utf-8")), settings.length)
                for path in (options.text, options.held_out)
            )
            torch.manual_seed(0)
            model = trainable(artifact, options.out / f"export-{name}", settings)
            runs.append(Run(num_bits, initialisation, *train(model, text, held_out[: settings.num_held_out], settings)))
            values = {"settings": asdict(settings), "runs": [asdict(run) for run in runs]}
            (options.out / "results.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
            (options.out / "table.md").write_text(table(runs), encoding="utf-8")
            print(table(runs[-1:]).splitlines()[-1], flush=True)
    plot(runs, options.out / "curves.html")
    print(table(runs))


if __name__ == "__main__":
    main()
