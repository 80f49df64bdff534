"""``qerve export``: an artifact as other engines read it, and the proof that it says the same."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from .cli_output import WIDE, print_json

if TYPE_CHECKING:
    from .export.verify import Verification

Artifact = Annotated[Path, typer.Argument(help="Artifact directory.")]
Out = Annotated[Path, typer.Argument(help="Directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
HalfType = Literal["float16", "bfloat16"]
FloatType = Literal["float16", "bfloat16", "float32"]

EXAMPLE = "qerve export vllm artifacts/smollm2-w4 exports/smollm2-vllm"


def make_export_cli() -> typer.Typer:
    """The verbs below ``qerve export``."""
    cli = typer.Typer(help="Hand an artifact over to vLLM, PEFT, llama.cpp or transformers.", no_args_is_help=True)
    for name, verb, example in (
        ("vllm", vllm, EXAMPLE),
        ("peft", peft, "qerve export peft artifacts/smollm2-w4 exports/smollm2-peft --base dense"),
        ("gguf", gguf, "qerve export gguf artifacts/smollm2-w4 exports/smollm2-gguf"),
        ("dense", dense, "qerve export dense artifacts/smollm2-w4 exports/smollm2-dense"),
        ("compose-adapter", compose_adapter, "qerve export compose-adapter exports/smollm2-vllm my-lora composed"),
        ("verify", verify, "qerve export verify exports/smollm2-vllm --artifact artifacts/smollm2-w4"),
    ):
        cli.command(name, epilog=f"Example: {example}")(verb)
    return cli


def vllm(
    artifact: Artifact,
    out: Out,
    *,
    layout: Annotated[
        Literal["compressed-tensors", "gptq"], typer.Option("--format", help="Format of the base.")
    ] = "compressed-tensors",
    inputs: Annotated[
        Literal["keep", "drop", "int8"],
        typer.Option(help="Quantization of inputs: as the artifact has it, none, 8 bits per token (W4A8, W8A8)."),
    ] = "keep",
    dtype: Annotated[HalfType, typer.Option(help="Of scales and all that is not codes; float16 keeps scales.")] = (
        "float16"
    ),
    name: Annotated[str | None, typer.Option(help="Name of the served model. [default: that of OUT]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantized base and LoRA adapter for vLLM, with the line that serves them."""
    from .export.vllm import VllmOptions, export_vllm

    options = VllmOptions(layout, inputs, dtype, name)
    _print(out, export_vllm(artifact, out, options, overwrite=overwrite), as_json=as_json)


def peft(
    artifact: Artifact,
    out: Out,
    *,
    base: Annotated[
        Literal["dense", "nf4"], typer.Option(help="Codes dequantized, or NF4 as bitsandbytes reads it.")
    ] = "dense",
    dtype: Annotated[FloatType, typer.Option(help="Of a dense base.")] = "float32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Base of the codes and the correction as a trainable adapter, for fine-tuning with PEFT."""
    from .export.peft import export_peft

    _print(out, export_peft(artifact, out, base, dtype, overwrite=overwrite), as_json=as_json)


def gguf(
    artifact: Artifact,
    out: Out,
    *,
    kind: Annotated[
        Literal["auto", "q4_0", "q4_1", "q5_0", "q8_0", "f16"],
        typer.Option("--type", help="Of the weights; auto: the smallest that holds each layer's codes exactly."),
    ] = "auto",
    merge: Annotated[
        bool, typer.Option("--merge", help="Correction in the weights (q8_0 or f16), no adapter.")
    ] = False,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.ggml.pre, where the tokenizer does not tell.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """GGUF model and LoRA adapter for llama.cpp."""
    from .export.gguf import GgufOptions, export_gguf

    options = GgufOptions(kind, merge, pre_tokenizer)
    _print(out, export_gguf(artifact, out, options, overwrite=overwrite), as_json=as_json)


def dense(
    artifact: Artifact,
    out: Out,
    *,
    dtype: Annotated[FloatType, typer.Option(help="Of all weights.")] = "bfloat16",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Plain Hugging Face checkpoint of the corrected weights."""
    from .export.dense import export_dense

    _print(out, export_dense(artifact, out, dtype, overwrite=overwrite), as_json=as_json)


def compose_adapter(
    export: Annotated[Path, typer.Argument(help="Export for vLLM or PEFT, or an adapter's directory.")],
    adapter: Annotated[Path, typer.Argument(help="LoRA adapter in PEFT's format, made for the same network.")],
    out: Out,
) -> None:
    """Join a LoRA adapter of your own with the correction: one adapter that is both."""
    from .export.compose import compose_adapters

    rank = compose_adapters(export, adapter, out)
    print(f"{out}: rank {rank}; serve with --max-lora-rank {rank}")


def verify(
    export: Annotated[Path, typer.Argument(help="Directory that `qerve export` wrote.")],
    *,
    artifact: Annotated[
        Path | None, typer.Option(help="Compare with this artifact, not with the results stored beside the export.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read an export back and compare it with the artifact again."""
    from .export.verify import verify_export

    _print(export, verify_export(export, artifact), as_json=as_json)


def _print(out: Path, result: "Verification", *, as_json: bool) -> None:
    if as_json:
        print_json({"export": str(out), **asdict(result)})
        return
    table = Table(title=str(out), show_header=False, title_justify="left")
    for name, value in result.rows().items():
        table.add_row(name, value)
    console = Console()
    console.print(table, width=None if console.is_terminal else WIDE)
