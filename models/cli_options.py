"""The options that describe a build, as one table, and how they become a configuration."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import BuildConfig, Option
from .errors import SchemeError


@dataclass(frozen=True, slots=True)
class BuildOption:
    """One command-line option: ``--name`` sets ``field`` in ``section`` of ``BuildConfig`` ("": at its top level)."""

    name: str
    section: str
    field: str
    kind: Any
    help: str
    flags: tuple[str, ...] = ()


WEIGHTS, ACTIVATIONS, CORRECTION = "Weights", "Activations", "Correction"
TRANSFORM, BUDGET, CALIBRATION, TRAINING = "Transforms", "Budget", "Calibration", "Training"
_PANELS = {
    "scheme": WEIGHTS,
    "quantizer": WEIGHTS,
    "": WEIGHTS,
    "activations": ACTIVATIONS,
    "attention": ACTIVATIONS,
    "reconstruct": CORRECTION,
    "transform": TRANSFORM,
    "budget": BUDGET,
    "calibration": CALIBRATION,
    "training": TRAINING,
    "vocabulary": WEIGHTS,
}
BUILD_OPTIONS = (
    BuildOption("num_bits", "scheme", "num_bits", int, "Bits per code, 2 to 8. [default: 4]"),
    BuildOption("group_size", "scheme", "group_size", int, "Channels per scale, or -1 per row. [default: 64]"),
    BuildOption("symmetric", "scheme", "is_symmetric", bool, "[default: asymmetric]", ("--symmetric/--asymmetric",)),
    BuildOption("format", "scheme", "format", str, "int, mxint, mxfp4, nf4. [default: int]"),
    BuildOption("exponent", "scheme", "exponent", str, "Shared exponent of mxint: floor (QERA), ceil (LQER)."),
    BuildOption("quantizer", "quantizer", "method", str, "rtn, gptq. [default: rtn]"),
    BuildOption("clip_search", "quantizer", "use_clip_search", bool, "Search each group's range for the least error."),
    BuildOption("act_order", "quantizer", "use_act_order", bool, "gptq: channels with the largest inputs first."),
    BuildOption("damping", "quantizer", "damping", float, "gptq: share of the mean diagonal added. [default: 0.01]"),
    BuildOption("objective", "", "objective", str, "Codes stand in for: weight, output. [default: weight]"),
    BuildOption("head_bits", "vocabulary", "head_bits", int, "Bits of the output head: 16, 8, 4. [default: 16]"),
    BuildOption("embedding_bits", "vocabulary", "embedding_bits", int, "Bits of the embedding: 16, 8. [default: 16]"),
    BuildOption("act_bits", "activations", "num_bits", int, "Bits of activations; none without. [default: 16-bit]"),
    BuildOption("act_group_size", "activations", "group_size", int, "Channels per scale, or -1 per token."),
    BuildOption("act_symmetric", "activations", "is_symmetric", bool, "", ("--act-symmetric/--act-asymmetric",)),
    BuildOption("act_format", "activations", "format", str, "int, mxint, mxfp4. [default: int]"),
    BuildOption("act_clip_ratio", "activations", "clip_ratio", float, "Share of the range to span. [default: 1]"),
    BuildOption("attention_bits", "attention", "num_bits", int, "Bits of queries, keys, values. [default: 16-bit]"),
    BuildOption("attention_group_size", "attention", "group_size", int, "Channels per scale, or -1 per token."),
    BuildOption(
        "attention_symmetric", "attention", "is_symmetric", bool, "", ("--attention-symmetric/--attention-asymmetric",)
    ),
    BuildOption("method", "reconstruct", "method", str, "Reconstruction method. [default: qera-exact]"),
    BuildOption("rank", "reconstruct", "rank", int, "Rank of the correction. [default: 32]"),
    BuildOption(
        "factor_dtype", "reconstruct", "factor_dtype", str, "bfloat16, float16, float32, int8, int4, mxint8, .."
    ),
    BuildOption("refit", "reconstruct", "refit", bool, "Fit the correction once more, to quantized inputs."),
    BuildOption("option", "reconstruct", "options", list[str], "NAME=VALUE of the method; repeatable."),
    BuildOption("rotation", "transform", "rotation", str, "Hadamard: none, online, offline. [default: none]"),
    BuildOption("rotation_block", "transform", "rotation_block", int, "Width of its blocks. [default: whole]"),
    BuildOption("flatten", "transform", "flatten", float, "SmoothQuant's alpha; 1: SERQ's flattening."),
    BuildOption("permute", "transform", "permute", bool, "Order the hidden channels of the MLP by size."),
    BuildOption("target_bits", "budget", "target_bits", float, "Choose bits and rank per layer for this many bits."),
    BuildOption("max_rank", "budget", "max_rank", int, "Largest rank to choose. [default: 64]"),
    BuildOption(
        "calibration", "calibration", "source", str, "self, none, a .txt/.jsonl/.json/.safetensors file, hf:DATASET."
    ),
    BuildOption("num_sequences", "calibration", "num_sequences", int, "Calibration sequences. [default: 128]"),
    BuildOption("sequence_length", "calibration", "sequence_length", int, "Tokens per sequence. [default: 2048]"),
    BuildOption("batch_size", "calibration", "batch_size", int, "Sequences at once. [default: 2]"),
    BuildOption("num_holdout", "calibration", "num_holdout", int, "Sequences kept for perplexity. [default: 4]"),
    BuildOption(
        "calibration_inputs", "calibration", "inputs", str, "quantized, sequential, dense. [default: quantized]"
    ),
    BuildOption("shrinkage", "calibration", "shrinkage", float, "Share of correlations left out. [default: 0]"),
    BuildOption("seed", "calibration", "seed", int, "Seed of the self-written text. [default: 0]"),
    BuildOption("num_epochs", "training", "num_epochs", int, "qer: passes over the calibration set. [default: 1]"),
    BuildOption("num_blocks", "training", "num_blocks", int, "qer: decoder layers trained together. [default: 1]"),
    BuildOption("learning_rate", "training", "learning_rate", float, "qer: of the factors. [default: the merge's]"),
    BuildOption("scale_learning_rate", "training", "scale_learning_rate", float, "qer: of the scales. [default: 2e-3]"),
    BuildOption("precision", "training", "precision", str, "qer: float32, bfloat16. [default: float32]"),
    BuildOption(
        "end_to_end_epochs", "training", "end_to_end_epochs", int, "qer: passes that train all scales. [default: 0]"
    ),
)


def with_build_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give ``verb`` the options of ``BUILD_OPTIONS`` and ``--config``; it receives ``settings: BuildConfig``."""
    own = [it for it in inspect.signature(verb, eval_str=True).parameters.values() if it.name != "settings"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _annotations()
    ]

    def run(**values: Any) -> None:
        chosen = {parameter.name: values.pop(parameter.name) for parameter in added}
        verb(**values, settings=build_config(chosen.pop("config"), chosen))

    signature = inspect.Signature([*own, *added])
    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {it.name: it.annotation for it in signature.parameters.values()}
    return run


def _annotations() -> Iterator[tuple[str, Any]]:
    yield "config", Annotated[Path | None, typer.Option(help="Configuration (.toml, .json); options override it.")]
    for option in BUILD_OPTIONS:
        settings = typer.Option(
            *option.flags, help=option.help, rich_help_panel=_PANELS[option.section], show_default=False
        )
        yield option.name, Annotated[option.kind | None, settings]


def build_config(path: Path | None, chosen: dict[str, Any]) -> BuildConfig:
    """The configuration in ``path`` (or the defaults) with every option that is not None laid over it.

    Raises:
        SchemeError: unknown key, wrong type, value out of range.
    """
    values = (BuildConfig() if path is None else BuildConfig.read(path)).to_dict()
    for option in BUILD_OPTIONS:
        value = chosen.get(option.name)
        if value is None:
            continue
        if option.section == "":
            values[option.field] = value
            continue
        # None stands for a part that is off; the first option about it switches it on.
        section = values[option.section] = values[option.section] or {}
        section[option.field] = section[option.field] | _method_options(value) if option.kind == list[str] else value
    return BuildConfig.from_dict(values, "command line")


def _method_options(texts: list[str]) -> dict[str, Option]:
    """``NAME=VALUE`` texts: true and false, whole numbers, numbers, or else text."""
    options: dict[str, Option] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise SchemeError(f"--option {text!r}: write NAME=VALUE, such as iterations=5")
        options[name.replace("-", "_")] = _parsed(value)
    return options


def _parsed(text: str) -> Option:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
