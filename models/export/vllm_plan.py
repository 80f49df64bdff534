"""Whether vLLM can run an artifact, and in which of its formats: decided from the manifest, before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..artifact.record import LinearRecord
from ..errors import ExportError
from ..scheme import PER_CHANNEL, PER_TOKEN, ActivationScheme, QuantScheme
from .adapter import VLLM_RANKS, adapter_rank
from .compressed_tensors import PACKED, SIGNED
from .gptq import check_gptq
from .source import ExportSource

Format = Literal["compressed-tensors", "gptq"]
Inputs = Literal["keep", "drop", "int8"]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM runs as one, which therefore share one scheme."""

DENSE_REMEDY = "use `qerve export dense`, which takes every artifact"
_INT8_INPUTS = ActivationScheme(8, PER_TOKEN, is_symmetric=True)


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """How an artifact is written for vLLM.

    layout:      ``pack-quantized``, ``int-quantized`` or ``gptq``
    groups:      weight schemes with the module paths that have them
    activations: how vLLM quantizes the inputs of the base; None: not at all
    rank:        of the adapter; 0: none
    """

    layout: str
    groups: tuple[tuple[QuantScheme, tuple[str, ...]], ...]
    activations: ActivationScheme | None
    rank: int
    notes: tuple[str, ...]


def plan_vllm(source: ExportSource, layout: Format, inputs: Inputs) -> VllmPlan:
    """Decide formats, or say why there is none.

    Args:
        source: the artifact.
        layout: family of formats.
        inputs: quantization of inputs: as the artifact has it, none, or 8 bits per token whatever the artifact says.

    Raises:
        ExportError: vLLM has no format for a layer; names it, and what to do.
    """
    records = source.manifest.linears
    notes: list[str] = []
    activations = _inputs(records, inputs, notes)
    schemes = {path: _as_integers(path, record.scheme) for path, record in records.items()}
    _check_fused(schemes)
    groups = tuple(
        (it, tuple(path for path in schemes if schemes[path] == it)) for it in dict.fromkeys(schemes.values())
    )
    if layout == "gptq":
        chosen = _plan_gptq(records, schemes, activations, len(groups))
    elif activations is None:
        chosen = PACKED
        notes += [note for scheme, _ in groups if (note := _kernel_note(scheme))]
    else:
        chosen = SIGNED
        notes += _check_integer_products(groups, activations)
    return VllmPlan(chosen, groups, activations, adapter_rank(source, VLLM_RANKS), tuple(dict.fromkeys(notes)))


def _as_integers(path: str, scheme: QuantScheme) -> QuantScheme:
    """``scheme`` as vLLM's integers: MXINT is one, symmetric with scales that happen to be powers of two."""
    if scheme.format == "mxint":
        return QuantScheme(scheme.num_bits, scheme.group_size, is_symmetric=True)
    if scheme.format != "int":
        raise ExportError(
            f"{path}: codes of {scheme.format} are no integers, which vLLM's formats need; rebuild with --format int, "
            f"or {DENSE_REMEDY}"
        )
    return scheme


def _check_fused(schemes: Mapping[str, QuantScheme]) -> None:
    for path, scheme in schemes.items():
        parent, _, kind = path.rpartition(".")
        for members in FUSED:
            others = [it for it in members if kind in members and schemes[f"{parent}.{it}"] != scheme]
            if others:
                raise ExportError(
                    f"{path} is {scheme} and {parent}.{others[0]} {schemes[f'{parent}.{others[0]}']}, but vLLM runs "
                    f"{'/'.join(members)} as one layer of one scheme; rebuild with equal bits for them (under [layers] "
                    f"in the configuration that `qerve plan --write` gives), or {DENSE_REMEDY}"
                )


def _inputs(records: Mapping[str, LinearRecord], inputs: Inputs, notes: list[str]) -> ActivationScheme | None:
    found = dict.fromkeys(record.activations for record in records.values())
    if inputs == "int8":
        notes.append("inputs are rounded to 8 bits per token by vLLM, whatever the artifact says")
        return _INT8_INPUTS
    if found.keys() == {None}:
        return None
    if inputs == "drop":
        notes.append("the artifact quantizes inputs; here they are not quantized, as asked for")
        return None
    scheme = next(it for it in found if it is not None)
    is_fitting = scheme.format == "int" and scheme.num_bits == 8 and scheme.group_size == PER_TOKEN
    if len(found) > 1 or not is_fitting or scheme.clip_ratio != 1:
        raise ExportError(
            f"inputs are quantized ({scheme}), for which vLLM has no format: it knows 8-bit integers per token, "
            "unclipped. Leave their quantization out with --inputs drop, or rebuild with --act-bits 8 "
            "--act-group-size -1"
        )
    return scheme


def _check_integer_products(
    groups: tuple[tuple[QuantScheme, tuple[str, ...]], ...], activations: ActivationScheme
) -> list[str]:
    notes = ["vLLM gives the low-rank branch inputs before their quantization, the artifact after it"]
    for scheme, paths in groups:
        is_w8a8 = scheme.num_bits == 8 and scheme.group_size == PER_CHANNEL
        if not scheme.is_symmetric or not (is_w8a8 or scheme.num_bits == 4):
            raise ExportError(
                f"{paths[0]}: {scheme} with inputs of {activations}; vLLM multiplies integers for symmetric weights of "
                "8 bits per channel (W8A8) or 4 bits (W4A8). Export with --inputs drop for weights alone, or rebuild"
            )
        if scheme.num_bits == 4:
            notes.append("W4A8: vLLM has kernels for Arm processors; elsewhere export with --inputs drop")
    return notes


def _plan_gptq(
    records: Mapping[str, LinearRecord],
    schemes: Mapping[str, QuantScheme],
    activations: ActivationScheme | None,
    num_groups: int,
) -> str:
    if activations is not None:
        raise ExportError("GPTQ's format has no quantized inputs; leave them out with --inputs drop")
    if num_groups > 1:
        raise ExportError(
            f"GPTQ's format has one scheme for all layers, the artifact {num_groups}; use compressed-tensors"
        )
    for path, scheme in schemes.items():
        check_gptq(path, scheme, (records[path].out_features, records[path].in_features))
    return "gptq"


def _kernel_note(scheme: QuantScheme) -> str | None:
    """What is known of vLLM's kernels for weights of ``scheme``."""
    if scheme.num_bits != 4:
        return f"{scheme}: vLLM has kernels for it on GPUs only"
    if scheme.group_size not in (PER_CHANNEL, 32, 64, 128):
        return f"{scheme}: vLLM's processors take it; on GPUs the usual kernels want groups of 32, 64 or 128"
    return None
